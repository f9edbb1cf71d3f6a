"""`export.build` on a dense checkpoint: one line says how, and with --adapter-experts it is an FFT-MoE base."""

import pytest

from export.build import main
from protocol.manifest import read_base, read_manifest
from tests.export.families import tiny_fft


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_fft.write_dense(tmp_path_factory.mktemp("dense"), "qwen2")


def test_an_artifact_of_adapter_experts(dense, small_profile, tmp_path, capsys):
    arguments = ["--checkpoint", str(dense), "--profile", str(small_profile)]
    asked = ["--adapter-experts", "3", "--adapter-top-k", "1", "--out", str(tmp_path)]
    assert main([*arguments, *asked]) == 0
    base = read_base(tmp_path / "base.json")
    assert (base.num_experts, base.top_k, base.experts, base.peft) == (3, 1, {}, None)
    shape = read_manifest(tmp_path / "small" / "manifest.json").shape
    assert {slot.format for layer in shape.slots for slot in layer} == {"none"}
    assert capsys.readouterr().out.strip().endswith("small")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--adapter-experts M trains M small ones"),
        (["--adapter-experts", "0"], "of 0 adapter experts cannot be used"),
        (["--adapter-experts", "4", "--adapter-top-k", "5"], "5 of 4 adapter experts"),
        (["--adapter-top-k", "1"], "--adapter-top-k is for --adapter-experts"),
    ],
)
def test_a_dense_checkpoint_needs_the_flag(dense, small_profile, tmp_path, capsys, more, words):
    arguments = ["--checkpoint", str(dense), "--profile", str(small_profile)]
    assert main([*arguments, "--out", str(tmp_path / "out"), *more]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1]
    assert not (tmp_path / "out" / "base.json").exists()

import json

import pytest

from export.build import main
from protocol.manifest import read_base, read_manifest


def arguments(checkpoint, profile, out):
    return ["--checkpoint", str(checkpoint), "--profile", str(profile), "--out", str(out)]


def one_line(capsys):
    text = capsys.readouterr().err.strip().splitlines()
    return text[-1]


def test_the_selection_is_kept_and_the_prediction_is_within_budget(store):
    artifact = read_manifest(store / "small" / "manifest.json")
    base = read_base(store / "base.json")
    assert artifact.experts == {"0": (0, 1, 3), "1": (1, 2)}
    assert artifact.shape.slots == (3, 2)
    assert artifact.base == base.base
    assert 0 < artifact.memory.predicted <= artifact.memory.budget == 32 << 20
    for blob in (artifact.train.blob, artifact.evaluate.blob, artifact.dense, artifact.tokenizer):
        assert (store / "blobs" / blob.sha256).stat().st_size == blob.bytes


def test_a_second_build_finds_the_programs(store, tiny_checkpoint, small_profile, capsys):
    before = sorted(p.name for p in (store / "blobs").iterdir())
    command = [
        *arguments(tiny_checkpoint, small_profile, store),
        "--experts",
        str(store / "selection.json"),
    ]
    assert main(command) == 0
    assert sorted(p.name for p in (store / "blobs").iterdir()) == before
    assert capsys.readouterr().out.strip().endswith("small")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--profile", "pixel_9"], "did you mean 'pixel_8'"),
        (["--scale-budget", "0.0001"], "do not fit"),
        (["--sequence", "4096"], "reads at most 64 tokens"),
        (["--answers", "16"], "1 to 15 wanted"),
        (["--rank", "-1"], "a positive number wanted"),
        (["--scale-budget", "1", "--scale-budget", "2"], "given 2 times for 1 profiles"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tiny_checkpoint, small_profile, tmp_path, capsys, more, words
):
    assert main([*arguments(tiny_checkpoint, small_profile, tmp_path / "s"), *more]) == 2
    line = one_line(capsys)
    assert line.startswith("export.build: ")
    assert words in line
    assert not list((tmp_path / "s").glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nonsense", "not JSON"),
        ({"layers": {"0": [0, 1]}}, "0, 1 wanted"),
        ({"layers": {"0": [0, 1], "1": [0, 9]}}, "from 0 to 3 wanted"),
        ({"layers": {"0": [0, 1], "1": [2]}}, "at least 2 different ids"),
        ({"mass": [[1, 2]]}, "[2, 4] of numbers"),
        ({}, '"layers" or "mass"'),
    ],
)
def test_a_bad_experts_file_is_refused(
    tiny_checkpoint, small_profile, tmp_path, capsys, content, words
):
    path = tmp_path / "experts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    command = [*arguments(tiny_checkpoint, small_profile, tmp_path / "s"), "--experts", str(path)]
    assert main(command) == 2
    assert words in one_line(capsys)


def test_a_store_holds_one_base(store, small_profile, tmp_path, capsys, make_checkpoint):
    other = make_checkpoint(tmp_path / "other", intermediate_size=64)
    assert main(arguments(other, small_profile, store)) == 2
    assert "another base" in one_line(capsys)

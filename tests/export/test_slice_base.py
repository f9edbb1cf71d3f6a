import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeForCausalLM

from export import checkpoint as checkpoints
from export import families, slice_dense
from export import slice_base as slicing
from export.blob_store import BlobStore, write_atomically
from export.checkpoint import Checkpoint, CheckpointError
from export.slice_base import slice_base
from protocol import packing, tensors
from protocol.manifest import ManifestError, to_json


def sliced(folder, out, formats=("int4", "int8")):
    checkpoint = Checkpoint(folder)
    store = BlobStore(out)
    family = families.of(checkpoint.config, "here")
    return slice_base(checkpoint, family, store, lambda stage: None, formats), store


@pytest.mark.parametrize("format", packing.FORMATS)
def test_every_expert_is_a_blob_close_to_its_weight(tiny_checkpoint, tmp_path, format):
    base, store = sliced(tiny_checkpoint, tmp_path, (format,))
    model = OlmoeForCausalLM.from_pretrained(tiny_checkpoint)
    # Half the widest distance between two levels, in units of the scale, and what rounding the scale adds; int4 may
    # cut off the largest weights of a group.
    near = {"int4": 8 / 0.84 - 7, "int8": 0.57, "nf4": 0.153}[format]
    squared, total = 0.0, 0.0
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        for e in range(4):
            blob = tensors.decode(store.get(base.experts[format][layer][e]))
            for name, weight in (
                ("gate_up", experts.gate_up_proj[e].detach().numpy()),
                ("down", experts.down_proj[e].detach().numpy()),
            ):
                back = packing.dequantize(blob[f"{name}.packed"], blob[f"{name}.scale"], format)
                step = np.repeat(blob[f"{name}.scale"].astype(np.float32), packing.GROUP, axis=1)
                assert (np.abs(back - weight) <= step * near).all()
                squared += ((back - weight) ** 2).sum()
                total += (weight**2).sum()
    assert base.error == {format: pytest.approx((squared / total) ** 0.5, rel=1e-3)}


def test_the_dense_part_packs_matrices_and_keeps_vectors_and_routers(tiny_checkpoint, tmp_path):
    base, store = sliced(tiny_checkpoint, tmp_path)
    state = OlmoeForCausalLM.from_pretrained(tiny_checkpoint).state_dict()
    assert set(base.dense) == set(base.experts) == set(base.error) == {"int4", "int8"}
    for format, wanted in (("int4", (300, 32)), ("int8", (300, 64))):
        dense = tensors.decode(store.get(base.dense[format]))
        assert dense["model.embed_tokens.weight.packed"].shape == wanted
        assert dense["model.embed_tokens.weight.scale"].shape == (300, 2)
        norm = dense["model.norm.weight"]
        assert norm.dtype == np.float32
        router = state["model.layers.1.mlp.gate.weight"].numpy()
        np.testing.assert_array_equal(dense["layers.1.router"], router)
        assert not any("experts" in name or "lm_head" in name for name in dense)


def test_extra_router_tensors_lie_beside_the_router(tiny_checkpoint, tmp_path):
    checkpoint = Checkpoint(tiny_checkpoint)
    family = dataclasses.replace(
        families.of(checkpoint.config, "here"),
        router_extra={"bias": "model.layers.{layer}.post_attention_layernorm.weight"},
    )
    store = BlobStore(tmp_path)
    base = slice_base(checkpoint, family, store, lambda stage: None, ("int8",))
    dense = tensors.decode(store.get(base.dense["int8"]))
    assert dense["layers.0.router.bias"].shape == (64,)


def test_adapter_experts_have_no_blobs(tiny_checkpoint, tmp_path):
    checkpoint = Checkpoint(tiny_checkpoint)
    family = dataclasses.replace(families.of(checkpoint.config, "here"), projections=("adapter",))
    base = slice_base(checkpoint, family, BlobStore(tmp_path), lambda stage: None)
    assert base.experts == {}
    assert base.error == {}


def test_fused_and_split_checkpoints_are_the_same_base(tiny_checkpoint, tmp_path):
    split, _ = sliced(tiny_checkpoint, tmp_path / "a")
    state = OlmoeForCausalLM.from_pretrained(tiny_checkpoint).state_dict()
    fused_folder = tmp_path / "fused"
    fused_folder.mkdir()
    save_file(
        {k: v.clone() for k, v in state.items() if k != "lm_head.weight"},
        fused_folder / "model.safetensors",
    )
    for name in ("config.json", "tokenizer.json"):
        (fused_folder / name).write_bytes((tiny_checkpoint / name).read_bytes())
    fused, _ = sliced(fused_folder, tmp_path / "b")
    assert any("gate_up_proj" in k for k in state)
    assert fused.base == split.base


def test_the_hash_follows_the_weights_and_nothing_is_written_twice(tiny_checkpoint, tmp_path):
    base, first = sliced(tiny_checkpoint, tmp_path / "a")
    again, second = sliced(tiny_checkpoint, tmp_path / "a")
    assert base == again
    assert first.new_bytes > 0
    assert second.new_bytes == 0
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    state = load_file(tiny_checkpoint / "model.safetensors")
    name = next(n for n in state if "experts.3.down_proj" in n)
    state[name] = state[name] + 1
    save_file(state, other_folder / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        (other_folder / file).write_bytes((tiny_checkpoint / file).read_bytes())
    other, _ = sliced(other_folder, tmp_path / "b")
    assert other.base != base.base
    for format in ("int4", "int8"):
        same = [
            x == y
            for a, b in zip(base.experts[format], other.experts[format], strict=True)
            for x, y in zip(a, b, strict=True)
        ]
        assert sum(same) == 7


def test_a_wrong_shape_is_named(tiny_checkpoint, tmp_path):
    state = load_file(tiny_checkpoint / "model.safetensors")
    name = next(n for n in state if "layers.1.mlp.experts.2.down_proj" in n)
    state[name] = torch.zeros(3, 3)
    folder = tmp_path / "bad"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_bytes((tiny_checkpoint / file).read_bytes())
    with pytest.raises(CheckpointError, match=r"down of expert 2 in layer 1 is \[3, 3\]"):
        sliced(folder, tmp_path / "s")


def test_base_index_is_frozen(tiny_checkpoint, tmp_path):
    base, _ = sliced(tiny_checkpoint, tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.base = "x"


def copy(checkpoint, to):
    shutil.copytree(checkpoint, to)
    return to


def keep(base, out):
    """As `export.build` does when it has finished."""
    write_atomically(out / "base.json", to_json(base))


def count_experts(monkeypatch):
    """The (layer, expert) pairs that are packed from now on."""
    seen, slice_expert = [], slicing._slice_expert

    def spy(base, checkpoint, family, store, place, formats):
        seen.append((*place, *formats))
        return slice_expert(base, checkpoint, family, store, place, formats)

    monkeypatch.setattr(slicing, "_slice_expert", spy)
    return seen


def test_the_number_of_jobs_changes_nothing(tiny_checkpoint, tmp_path):
    checkpoint = Checkpoint(tiny_checkpoint)
    family = families.of(checkpoint.config, "here")
    bases = [
        slice_base(checkpoint, family, BlobStore(tmp_path / str(j)), lambda stage: None, jobs=j)
        for j in (1, 3)
    ]
    assert bases[0] == bases[1]
    assert sorted(os.listdir(tmp_path / "1/blobs")) == sorted(os.listdir(tmp_path / "3/blobs"))


def test_dense_pieces_change_nothing(tiny_checkpoint, tmp_path, monkeypatch):
    whole, _ = sliced(tiny_checkpoint, tmp_path / "a")
    monkeypatch.setattr(slice_dense, "PIECE", 7 * 64)
    pieces, _ = sliced(tiny_checkpoint, tmp_path / "b")
    assert whole == pieces


def test_a_second_build_reads_no_weights(tiny_checkpoint, tmp_path, monkeypatch):
    base, _ = sliced(tiny_checkpoint, tmp_path)

    def forbidden(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "raw", forbidden)
    assert sliced(tiny_checkpoint, tmp_path)[0] == base
    keep(base, tmp_path)
    assert sliced(tiny_checkpoint, tmp_path, None)[0] == base


def test_only_what_is_missing_is_packed_again(tiny_checkpoint, tmp_path, monkeypatch):
    base, store = sliced(tiny_checkpoint, tmp_path, ("int4",))
    seen = count_experts(monkeypatch)
    more, _ = sliced(tiny_checkpoint, tmp_path)
    assert sorted(seen) == [(layer, e, "int8") for layer in range(2) for e in range(4)]
    assert more.experts["int4"] == base.experts["int4"]
    seen.clear()
    (store.folder / base.experts["int4"][1][2].sha256).unlink()
    assert sliced(tiny_checkpoint, tmp_path)[0] == more
    assert seen == [(1, 2, "int4")]


def test_a_changed_weight_is_noticed_even_with_the_old_time_stamp(tiny_checkpoint, tmp_path):
    folder = copy(tiny_checkpoint, tmp_path / "c")
    base, _ = sliced(folder, tmp_path / "s")
    file = folder / "model.safetensors"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sliced(folder, tmp_path / "s")[0].base != base.base


def test_a_large_changed_shard_is_noticed_without_reading_it(
    tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoints, "SMALL", 0)
    monkeypatch.setattr(checkpoints, "RACY", 0.05)
    folder = copy(tiny_checkpoint, tmp_path / "c")
    before = Checkpoint(folder).identity()
    assert Checkpoint(folder).identity() == before
    file = folder / "model.safetensors"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert Checkpoint(folder).identity() != before


def test_a_shard_that_changes_while_it_is_read_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    folder = copy(tiny_checkpoint, tmp_path / "c")
    seen, slice_expert = [], slicing._slice_expert

    def touch(*arguments):
        os.utime(folder / "model.safetensors")
        seen.append(1)
        return slice_expert(*arguments)

    monkeypatch.setattr(slicing, "_slice_expert", touch)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="changed while it was read"):
            sliced(folder, tmp_path / "s")
    assert len(seen) == 16


@pytest.mark.parametrize("victim", ["expert", "dense", "journal"])
def test_a_killed_build_leaves_nothing_half_written_and_goes_on(
    tiny_checkpoint, tmp_path, monkeypatch, victim
):
    program = f"""
import os, signal, sys
from pathlib import Path
from export import families, slice_base
from export.blob_store import BlobStore, Part
from export.checkpoint import Checkpoint
from export.journal import Journal
from export.tensor_file import TensorFile

def killing(method, after, half):
    calls = []
    def wrapped(self, *arguments):
        calls.append(1)
        if len(calls) > after:
            half(self, *arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *arguments)
    return wrapped

if "{victim}" == "expert":
    Part.write = killing(Part.write, 11, lambda p, d, o: os.pwrite(p.descriptor, d[: len(d) // 2], o))
elif "{victim}" == "dense":
    TensorFile.write = killing(TensorFile.write, 5, lambda *_: None)
else:
    Journal._write = killing(Journal._write, 4, lambda j, v: os.write(j._file.fileno(), b'{{"item"'))
checkpoint, out = Checkpoint(Path(sys.argv[1])), Path(sys.argv[2])
family = families.of(checkpoint.config, "")
slice_base.slice_base(checkpoint, family, BlobStore(out), lambda stage: None, jobs=1)
"""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        program,
        str(tiny_checkpoint),
        str(tmp_path / "s"),
    ]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    for path in (tmp_path / "s/blobs").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    seen = count_experts(monkeypatch)
    base, _ = sliced(tiny_checkpoint, tmp_path / "s")
    # The tokenizer is the first file; then each expert is two.
    assert len(seen) == {"expert": 8 - 5, "dense": 0, "journal": 8 - 3}[victim]
    assert base == sliced(tiny_checkpoint, tmp_path / "whole")[0]
    assert sorted(os.listdir(tmp_path / "s/blobs")) == sorted(os.listdir(tmp_path / "whole/blobs"))


def test_another_base_leaves_nothing_in_the_store(tiny_checkpoint, tmp_path, make_checkpoint):
    out = tmp_path / "s"
    base, _ = sliced(tiny_checkpoint, out)
    keep(base, out)
    before = sorted(os.listdir(out / "blobs")), (out / "slicing.jsonl").read_bytes()
    state = load_file(tiny_checkpoint / "model.safetensors")
    for name, other in (
        ("model.layers.0.mlp.experts.0.up_proj.weight", "first"),
        ("model.layers.1.mlp.experts.3.down_proj.weight", "last"),
        ("model.norm.weight", "dense"),
        (None, "tokenizer"),
    ):
        folder = copy(tiny_checkpoint, tmp_path / other)
        if name is None:
            (folder / "tokenizer.json").write_text("{}")
        else:
            save_file({**state, name: state[name] + 1}, folder / "model.safetensors")
        with pytest.raises(ManifestError, match="holds the slices of another base"):
            sliced(folder, out, None)
        assert sorted(os.listdir(out / "blobs")) == before[0]
    assert sliced(tiny_checkpoint, out, None)[0] == base


def test_the_same_base_from_another_directory_is_welcome(tiny_checkpoint, tmp_path):
    out = tmp_path / "s"
    base, _ = sliced(tiny_checkpoint, out)
    keep(base, out)
    again, store = sliced(copy(tiny_checkpoint, tmp_path / "c"), out, None)
    assert again == base


def test_a_store_keeps_its_formats(tiny_checkpoint, tmp_path):
    base, _ = sliced(tiny_checkpoint, tmp_path, ("nf4",))
    keep(base, tmp_path)
    assert sliced(tiny_checkpoint, tmp_path, None)[0] == base
    with pytest.raises(ManifestError, match="formats nf4 found, int4 wanted"):
        sliced(tiny_checkpoint, tmp_path, ("int4",))


def test_a_fused_tensor_of_more_experts_is_refused(tiny_checkpoint, tmp_path):
    state = OlmoeForCausalLM.from_pretrained(tiny_checkpoint).state_dict()
    state = {k: v.clone() for k, v in state.items() if k != "lm_head.weight"}
    name = "model.layers.0.mlp.experts.down_proj"
    state[name] = torch.cat([state[name], state[name]])
    folder = copy(tiny_checkpoint, tmp_path / "c")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is \[8, 64, 32\], \[4, 64, 32\] wanted"):
        sliced(folder, tmp_path / "s")


def test_types_that_are_not_floats_are_named(tiny_checkpoint, tmp_path):
    state = load_file(tiny_checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    state[name] = state[name].to(torch.float8_e4m3fn)
    folder = copy(tiny_checkpoint, tmp_path / "c")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is F8_E4M3, one of F64, F32, F16, BF16 wanted"):
        sliced(folder, tmp_path / "s")


def test_two_builds_at_once_share_the_work(tiny_checkpoint, tmp_path, monkeypatch):
    seen = count_experts(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: sliced(tiny_checkpoint, tmp_path)[0], range(2))
    assert first == second
    assert len(seen) == 8

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OlmoeForCausalLM

from export import families
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint, CheckpointError
from export.slice_base import slice_base
from protocol import int4, tensors


def sliced(folder, out):
    checkpoint = Checkpoint(folder)
    store = BlobStore(out)
    family = families.of(checkpoint.config, "here")
    return slice_base(checkpoint, family, store, lambda stage: None), store


def test_every_expert_is_a_blob_close_to_its_weight(tiny_checkpoint, tmp_path):
    base, store = sliced(tiny_checkpoint, tmp_path)
    model = OlmoeForCausalLM.from_pretrained(tiny_checkpoint)
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        for e in range(4):
            blob = tensors.decode(store.get(base.experts[layer][e]))
            for name, weight in (
                ("gate_up", experts.gate_up_proj[e]),
                ("down", experts.down_proj[e]),
            ):
                back = int4.dequantize(blob[f"{name}.packed"], blob[f"{name}.scale"])
                step = np.repeat(blob[f"{name}.scale"].astype(np.float32), int4.GROUP, axis=1)
                assert (np.abs(back - weight.detach().numpy()) <= step * 0.51).all()


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
    same = [
        x == y
        for a, b in zip(base.experts, other.experts, strict=True)
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

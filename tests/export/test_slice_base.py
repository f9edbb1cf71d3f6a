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
from protocol import packing, tensors


def sliced(folder, out, formats=("int4", "int8")):
    checkpoint = Checkpoint(folder)
    store = BlobStore(out)
    family = families.of(checkpoint.config, "here")
    return slice_base(checkpoint, family, store, lambda stage: None, formats), store


@pytest.mark.parametrize("format", packing.FORMATS)
def test_every_expert_is_a_blob_close_to_its_weight(tiny_checkpoint, tmp_path, format):
    base, store = sliced(tiny_checkpoint, tmp_path, (format,))
    model = OlmoeForCausalLM.from_pretrained(tiny_checkpoint)
    # Half the widest distance between two levels, in units of the scale, and what rounding the scale adds.
    near = {"int4": 0.51, "int8": 0.57, "nf4": 0.153}[format]
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
    assert base.error == {format: pytest.approx((squared / total) ** 0.5, abs=2e-6)}


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

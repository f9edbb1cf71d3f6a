"""Both forms of a checkpoint, per-expert tensors and fused ones, are the same base; what is in the blobs."""

import numpy as np
import pytest
from safetensors.torch import save_file

from export import families
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint
from export.slice_base import slice_base
from protocol import packing, tensors
from tests.export.families import tiny


def test_fused_tensors_under_the_models_own_names_give_the_same_base(base, tmp_path):
    index, _, checkpoint = base
    model = tiny.random_model(index.model_type)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    if index.config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    fused = Checkpoint(tmp_path)
    family = families.of(fused.config, "here")
    found = slice_base(fused, family, BlobStore(tmp_path / "store"), lambda message: None)
    assert found.experts == index.experts
    assert found.dense == index.dense
    assert found.base == index.base


def test_blobs_hold_the_experts_of_transformers(base):
    index, store, _ = base
    model = tiny.random_model(index.model_type)
    family = families.of(index.config, "here")
    parameters = dict(model.named_parameters())
    layer = index.moe_layers[-1]
    blob = tensors.decode(store.get(index.experts["int8"][-1][4]))
    for projection in index.projections:
        weight = parameters[family.fused[projection].format(layer=layer)][4].detach().numpy()
        read = packing.dequantize(blob[f"{projection}.packed"], blob[f"{projection}.scale"], "int8")
        np.testing.assert_allclose(read, weight, atol=np.abs(weight).max() / 200)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_dense_blobs_hold_what_routers_need_beside_their_rows(model_type, sliced):
    index, store, _ = sliced(model_type)
    dense = tensors.decode(store.get(index.dense["int4"]))
    group = dense["layers.1.router.group"]
    assert group.shape == (8, 4)
    assert group.argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    bias = dict(tiny.random_model(model_type).named_buffers()).get(
        "model.layers.1.mlp.gate.e_score_correction_bias"
    )
    assert ("layers.1.router.bias" in dense) == (model_type == "deepseek_v3")
    if bias is not None:
        np.testing.assert_array_equal(dense["layers.1.router.bias"], bias.numpy())

"""Every family's adapter as the server writes it: stock PEFT, loaded afresh, gives the logits of our own arithmetic."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export import verify_adapter
from protocol import names, tensors
from server import adapters, peft_adapter
from tests.export.families import lowered, setting, tiny, tiny_switch

RANK = 3
FAMILIES = (*tiny.CONFIGS, "switch_transformers")


@pytest.fixture(scope="module", params=FAMILIES)
def written(request, sliced, tmp_path_factory):
    """(checkpoint, adapter directory): random factors for some experts, the rest as they start."""
    root = tmp_path_factory.mktemp("adapter")
    if request.param in tiny.CONFIGS:
        base, store, checkpoint = sliced(request.param)
    else:
        checkpoint = tiny_switch.write_switch(tmp_path_factory.mktemp("switch"))
        base, _, store = lowered.sliced(checkpoint, checkpoint / "store")
    rng = np.random.default_rng(0)
    state = adapters.fresh(base, RANK)
    for name, value in state.items():
        key = names.parse(name)
        if key.expert in setting.HELD[6][:3] and key.factor != "lora_A":
            state[name] = rng.normal(0, 0.2, value.shape).astype(np.float32)
    dense = tensors.decode((store.folder / base.dense["int8"].sha256).read_bytes())
    routers = {layer: dense[f"layers.{layer}.router"] for layer in base.moe_layers}
    files = peft_adapter.peft_files(state, routers, base, version=1, base_name="tiny", extra=dense)
    for name, data in {**files, "adapter.safetensors": tensors.encode(state)}.items():
        (root / name).write_bytes(data)
    return checkpoint, root


def test_stock_peft_gives_the_logits_of_our_arithmetic(written):
    verdict = verify_adapter.verify(*written)
    assert verdict.experts_changed > 0
    assert verdict.logit_difference < 1e-4
    assert verdict.weight_difference < 1e-6
    assert verdict.logit_change > 0.1


def test_two_experts_swapped_are_noticed(written, tmp_path):
    checkpoint, folder = written
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    name = next(n for n in state if n.endswith("lora_B.weight"))
    if config["target_parameters"]:  # fused: the expert runs fastest
        columns = state[name].reshape(state[name].shape[0], RANK, -1)
        state[name] = np.ascontiguousarray(columns[:, :, ::-1]).reshape(state[name].shape)
    else:
        other = name.replace("expert_0", "expert_2")
        state[name], state[other] = state[other], state[name]
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(verify_adapter.VerifyError, match="differs from the server's model"):
        verify_adapter.verify(checkpoint, tmp_path)

"""The PEFT directory against the real thing: stock transformers, stock PEFT, fresh load."""

import json
import warnings

import numpy as np
import pytest

from protocol import lora, names
from server import adapters, closing
from server.artifacts import Artifacts
from tests.server import tiny_store
from tests.server.tiny_store import EXPERTS, FULL, HIDDEN, INTERMEDIATE, LAYERS, RANK

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=len(LAYERS),
        num_attention_heads=2, num_key_value_heads=2, num_experts=EXPERTS, num_experts_per_tok=2,
        eos_token_id=1, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(config).eval()


def gates(model):
    """Base router rows in float16, as the store keeps them; set in the model too."""
    routers = {}
    for layer in LAYERS:
        weight = model.model.layers[layer].mlp.gate.weight
        weight.data = weight.data.half().float()
        routers[layer] = weight.detach().numpy()
    return routers


def random_adapter(base):
    rng = np.random.default_rng(3)
    fresh = adapters.fresh(base, RANK)
    return {k: rng.normal(size=v.shape, scale=0.3).astype(np.float32) for k, v in fresh.items()}


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 30)[None]).logits.numpy()


def test_a_fresh_stock_load_gives_the_logits_of_the_merged_model(tmp_path, model):
    base = tiny_store.build(tmp_path / "store", {"p": ((FULL, FULL), (FULL, FULL))}, gates(model))
    adapter = random_adapter(base)
    artifacts = Artifacts(tmp_path / "store")
    closing.write_version(tmp_path / "adapters", 7, adapter, artifacts, "somewhere/base")
    model.save_pretrained(tmp_path / "base")

    # By hand: add SCALE * B @ A to every expert and the change to every router row.
    before = logits(model)
    with torch.no_grad():
        for layer in LAYERS:
            moe = model.model.layers[layer].mlp
            weights = {"gate_up": moe.experts.gate_up_proj, "down": moe.experts.down_proj}
            for e in range(EXPERTS):
                for p in base.projections:
                    a = adapter[names.lora(layer, e, p, "lora_A")]
                    b = adapter[names.lora(layer, e, p, "lora_B")]
                    weights[p][e] += torch.from_numpy(lora.delta(a, b))
                moe.gate.weight[e] += torch.from_numpy(adapter[names.router_row(layer, e)])
    wanted = logits(model)
    assert np.abs(wanted - before).max() > 1e-2

    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapters" / "7").eval()
    np.testing.assert_allclose(logits(loaded), wanted, atol=2e-5)


def test_keys_are_exactly_those_that_stock_peft_saves(tmp_path, model):
    base = tiny_store.build(tmp_path / "store", {"p": ((FULL, FULL), (FULL, FULL))}, gates(model))
    closing.write_version(
        tmp_path / "adapters", 0, adapters.fresh(base, RANK), Artifacts(tmp_path / "store"), ""
    )
    folder = tmp_path / "adapters" / "0"
    written = adapters.map_tensors(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    own = LoraConfig(
        r=RANK,
        lora_alpha=config["lora_alpha"],
        target_modules=[],
        target_parameters=config["target_parameters"],
        modules_to_save=config["modules_to_save"],
    )
    state = get_peft_model_state_dict(get_peft_model(model, own))
    assert {k: tuple(v.shape) for k, v in state.items()} == {k: v.shape for k, v in written.items()}
    assert config["lora_alpha"] / config["r"] == lora.SCALE


def test_version_0_changes_nothing(tmp_path, model):
    base = tiny_store.build(tmp_path / "store", {"p": ((FULL, FULL), (FULL, FULL))}, gates(model))
    closing.write_version(
        tmp_path / "adapters", 0, adapters.fresh(base, RANK), Artifacts(tmp_path / "store"), ""
    )
    before = logits(model)
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapters" / "0").eval()
    np.testing.assert_allclose(logits(loaded), before, atol=1e-6)

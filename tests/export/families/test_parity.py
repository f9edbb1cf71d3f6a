"""Every family, sliced: transformers with absent experts masked, our graph in eager torch, the torch backend."""

import numpy as np
import pytest
import torch

from edge.session import load_backend
from export import families
from protocol import lora, names
from protocol.manifest import Slot
from tests.export.families import reference, setting, tiny

EVERYONE = {n: (Slot(format="int4", rank=2),) * n for n in (6, 8)}


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def base(request, tmp_path_factory):
    """(index, store) of one family."""
    return setting.sliced(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def add_adapter(model, family, adapter):
    """Add LoRA and router changes to transformers' own weights."""
    parameters = dict(model.named_parameters())
    for name, value in adapter.items():
        key = names.parse(name)
        if key.projection is None:
            parameters[family.router.format(layer=key.layer)][key.expert] += torch.from_numpy(value)
        elif key.factor == "lora_A":
            change = lora.delta(value, adapter[name.replace("lora_A", "lora_B")])
            fused = family.fused[key.projection].format(layer=key.layer)
            parameters[fused][key.expert] += torch.from_numpy(change)


def transformers_logits(base, resident, slots, adapter, batch):
    """What transformers answers at the batch's positions, [B, K, V]."""
    family = families.of(base.config, "here")
    model = tiny.random_model(base.model_type)
    formats = {
        (layer, expert): slot.format
        for layer, ids in resident.items()
        for expert, slot in zip(ids, slots, strict=True)
    }
    reference.round_weights(model, family, base.moe_layers, "int8", formats)
    add_adapter(model, family, adapter)
    with torch.no_grad(), reference.masked(model, family, resident):
        logits = model(torch.from_numpy(batch.tokens)).logits
    return logits.reshape(-1, logits.shape[-1]).numpy()[batch.positions]


def test_torch_backend_is_transformers_with_absent_experts_masked(base):
    index, store = base
    resident, batch = setting.resident_of(index), setting.batch(index.vocabulary)
    adapter = setting.adapter(index, setting.SLOTS, 0.1)
    session = load_backend("torch").open_evaluate(
        setting.artifact(index, store, setting.SLOTS), resident
    )
    logits, stats = session.evaluate(batch, adapter)
    session.close()
    wanted = transformers_logits(index, resident, setting.SLOTS, adapter, batch)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    for layer in stats.values():
        assert layer.mass.sum() == pytest.approx(batch.valid.sum(), rel=1e-4)


def test_all_experts_resident_is_transformers(base):
    index, store = base
    slots = EVERYONE[index.num_experts]
    resident = {layer: tuple(range(index.num_experts)) for layer in index.moe_layers}
    batch = setting.batch(index.vocabulary)
    session = load_backend("torch").open_evaluate(setting.artifact(index, store, slots), resident)
    zero = {name: 0 * value for name, value in session.parameters().items()}
    logits, stats = session.evaluate(batch, zero)
    session.close()
    wanted = transformers_logits(index, {}, (), {}, batch)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert max(abs(layer.missed) for layer in stats.values()) < 1e-4

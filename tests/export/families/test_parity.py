"""The torch backend of every family against transformers with absent experts masked."""

import numpy as np
import pytest

from edge.session import load_backend
from protocol import names
from protocol.manifest import Slot
from tests.export.families import compare, setting

EVERYONE = {n: (Slot(format="int4", rank=2),) * n for n in (6, 8)}


def test_torch_backend_is_transformers_with_absent_experts_masked(base):
    index, store, _ = base
    resident, batch = setting.resident_of(index), setting.batch(index.vocabulary)
    adapter = setting.adapter(index, setting.SLOTS, 0.1)
    session = load_backend("torch").open_evaluate(
        setting.artifact(index, store, setting.SLOTS), resident
    )
    logits, stats = session.evaluate(batch, adapter)
    session.close()
    wanted = compare.transformers_logits(index, resident, setting.SLOTS, adapter)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    for layer in stats.values():
        assert layer.mass.sum() == pytest.approx(batch.valid.sum(), rel=1e-4)


def test_all_experts_resident_is_transformers(base):
    index, store, _ = base
    slots = EVERYONE[index.num_experts]
    resident = {layer: tuple(range(index.num_experts)) for layer in index.moe_layers}
    batch = setting.batch(index.vocabulary)
    session = load_backend("torch").open_evaluate(setting.artifact(index, store, slots), resident)
    # Output scales are no part of an adapter; without them they are 1.
    zero = {
        name: 0 * value
        for name, value in session.parameters().items()
        if names.parse(name) is not None
    }
    logits, stats = session.evaluate(batch, zero)
    session.close()
    wanted = compare.transformers_logits(index, {}, (), {})
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert max(abs(layer.missed) for layer in stats.values()) < 1e-4

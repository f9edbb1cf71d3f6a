"""The torch backend of Switch and FFT-MoE bases against our graph: logits, loss, gradients, statistics."""

import dataclasses

import numpy as np
import pytest

from edge.session import PLAIN, SessionError, Terms, load_backend
from export.families import fft_moe
from tests.export.families import (
    lowered,
    test_fft_moe,
    test_switch,
    tiny_fft,
    tiny_switch,
)


@pytest.fixture(scope="module", params=["switch", "gemma", "qwen3"])
def case(request, tmp_path_factory):
    """(base, family, store, shape, resident, batch, adapter)."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "switch":
        made = lowered.sliced(tiny_switch.write_switch(root / "base"), root / "store")
        t = test_switch
        return *made, t.SHAPE, t.RESIDENT, t.BATCH, t.adapter_of(made[0])
    folder = tiny_fft.write_dense(root / "base", request.param)
    asked = {fft_moe.EXPERTS: 4, fft_moe.TOP_K: 2}
    made = lowered.sliced(folder, root / "store", ("int8",), asked)
    t = test_fft_moe
    return *made, t.SHAPE, t.RESIDENT, t.BATCH, t.adapter_of(t.RESIDENT, t.SHAPE.slots)


EVERY_TERM = Terms(
    label_smoothing=0.1, balance=0.3, target_balance=0.2, z_loss=0.05, cap=2, active=1
)


@pytest.mark.parametrize("terms", [PLAIN, EVERY_TERM], ids=["plain", "terms"])
def test_it_is_the_graph(case, terms):
    *made, resident, batch, adapter = case
    backend, artifact = load_backend("torch"), lowered.artifact(*made, programs=False)
    if terms != PLAIN:
        bias = np.random.default_rng(8).normal(0, 2, artifact.base.vocabulary)
        terms = dataclasses.replace(terms, logit_bias=bias.astype(np.float32))
    session = backend.open_train(artifact, resident)
    session.load(adapter)
    loss, routed = session.forward_backward(batch, terms)
    graph = lowered.eager(*case, evaluate=False, terms=terms)
    assert loss == pytest.approx(float(graph["loss"]), abs=1e-5)
    gradients = session.gradients()
    assert set(gradients) == set(graph["gradients"]) > set(adapter)
    for name, value in graph["gradients"].items():
        np.testing.assert_allclose(gradients[name], value, atol=1e-5, err_msg=name)
    for layer, counts in routed.items():
        np.testing.assert_array_equal(counts, graph[f"layers.{layer}.routed"])
    for layer, changes in session.taylor().items():
        np.testing.assert_allclose(graph[f"layers.{layer}.taylor"], changes, atol=1e-5, rtol=1e-3)
    reader = backend.open_evaluate(artifact, resident)
    logits, stats = reader.evaluate(batch, adapter)
    graph = lowered.eager(*case, evaluate=True)
    np.testing.assert_allclose(logits, graph["logits"], atol=1e-4)
    for layer, found in stats.items():
        for name in ("mass", "top", "g_log_g", "output_norm", "peak", "high"):
            wanted = graph[f"layers.{layer}.{name}"]
            np.testing.assert_allclose(getattr(found, name), wanted, atol=1e-3, err_msg=name)
        assert found.missed == pytest.approx(float(graph[f"layers.{layer}.missed"].sum()), abs=1e-3)


def test_four_bit_torch_is_not_for_them(case):
    *made, resident, _, _ = case
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SessionError, match="builds gated causal experts"):
        load_backend("torch-nf4").open_train(lowered.artifact(*made, programs=False), resident)


def test_a_target_moves_the_gate(case):
    """Also of adapter experts: the heterogeneity-aware balance is about their gate (FFT-MoE)."""
    *made, resident, batch, adapter = case
    session = load_backend("torch").open_train(lowered.artifact(*made, programs=False), resident)
    session.load(adapter)
    changes = []
    for terms in (PLAIN, Terms(target_balance=1.0)):
        session.forward_backward(batch, terms)
        changes.append({n: v.copy() for n, v in session.gradients().items() if ".router." in n})
    for layer in resident:
        prefix = f"layers.{layer}.router."
        moved = [np.abs(changes[1][n] - v).max() for n, v in changes[0].items() if prefix in n]
        assert max(moved) > 1e-4

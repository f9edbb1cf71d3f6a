"""Each term of the local objective in the ExecuTorch program against the torch session: loss, gradients, Taylor."""

import numpy as np
import pytest

from edge.session import PLAIN, Terms, load_backend
from protocol import names
from tests.edge.test_parity import RESIDENT, setting

__all__ = ["setting"]
TARGETS = {
    0: np.array([0.1, 0.2, 0.3, 0.4], np.float32),
    1: np.array([0.0, 0.25, 0.75], np.float32),
}
VOCABULARY = 320  # of the tokenizer that the tiny base is made for
BIAS = np.random.default_rng(8).normal(0, 2, VOCABULARY).astype(np.float32)
TERMS = {
    "plain": PLAIN,
    "label smoothing": Terms(label_smoothing=0.2),
    "balance": Terms(balance=0.5),
    "uniform target": Terms(target_balance=0.5),
    "target": Terms(target_balance=0.5, targets=TARGETS),
    "z loss": Terms(z_loss=0.1),
    "cap": Terms(cap=2),
    "cap below top-k": Terms(cap=1),
    "cap backward": Terms(cap=2, cap_where="backward"),
    "active": Terms(active=1),
    "label prior": Terms(logit_bias=BIAS),
    "all": Terms(
        label_smoothing=0.1, balance=0.3, target_balance=0.2, z_loss=0.05, cap=3, active=1,
        targets=TARGETS, logit_bias=BIAS,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def opened(lowered, setting):
    """name -> open session; output scales are not 1."""
    _, _, adapter = setting
    scales = {names.output_scale(n): np.array([0.7 + n], np.float32) for n in RESIDENT}
    sessions = {}
    for name in ("torch", "executorch"):
        sessions[name] = load_backend(name).open_train(lowered, RESIDENT)
        sessions[name].load(adapter | scales)
    yield sessions
    for session in sessions.values():
        session.close()


def step(session, batch, terms):
    loss, routed = session.forward_backward(batch, terms)
    gradients = {n: v.copy() for n, v in session.gradients().items()}
    return loss, routed, gradients, {n: v.copy() for n, v in session.taylor().items()}


@pytest.mark.parametrize("name", TERMS)
def test_the_program_minimises_what_torch_does(opened, setting, name):
    prompts, rows, _ = setting
    batch = prompts.assemble(rows[:3], None)
    loss, routed, gradients, taylor = step(opened["torch"], batch, TERMS[name])
    found, counts, values, changes = step(opened["executorch"], batch, TERMS[name])
    assert found == pytest.approx(loss, rel=1e-5)
    assert values.keys() == gradients.keys()
    for key, gradient in gradients.items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(
            values[key], gradient, atol=1e-6 + 2e-5 * scale, rtol=1e-3, err_msg=key
        )
    for layer in RESIDENT:
        np.testing.assert_array_equal(counts[layer], routed[layer])
        np.testing.assert_allclose(changes[layer], taylor[layer], atol=1e-6, rtol=1e-3)
    assert any(np.abs(gradients[names.output_scale(n)]).max() > 1e-5 for n in RESIDENT)


def test_every_term_moves_the_gradients_of_the_program(opened, setting):
    prompts, rows, _ = setting
    batch = prompts.assemble(rows[:3], None)
    _, _, plain, _ = step(opened["executorch"], batch, PLAIN)
    for name, terms in TERMS.items():
        _, _, moved, _ = step(opened["executorch"], batch, terms)
        change = max(np.abs(moved[n] - v).max() for n, v in plain.items())
        assert (change > 1e-4) == (name != "plain"), (name, change)


def test_no_batch_uses_more_experts_than_the_cap(opened, setting):
    prompts, rows, _ = setting
    for start in range(0, 28, 4):
        batch = prompts.assemble(rows[start : start + 4], None)
        _, routed, gradients, _ = step(opened["executorch"], batch, Terms(cap=2))
        for layer, ids in RESIDENT.items():
            used = {e for e, n in zip(ids, routed[layer], strict=True) if n}
            assert len(used) <= 2
            for name, gradient in gradients.items():
                parsed = names.parse(name)
                if parsed is not None and parsed.layer == layer and parsed.expert not in used:
                    assert not gradient.any()


def test_statistics_hold_the_extremes(lowered, setting):
    prompts, rows, adapter = setting
    session = load_backend("executorch").open_evaluate(lowered, RESIDENT)
    _, stats = session.evaluate(prompts.assemble(rows[:3], None), adapter)
    session.close()
    for found in stats.values():
        assert (found.peak >= found.high).all()
        assert (found.high > 0).all()
        assert found.peak.max() < 1

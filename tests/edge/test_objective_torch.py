"""The terms of the local objective by hand, and the torch session that minimises them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from edge import objective_torch, session, slots
from edge.data import Row, prompter
from edge.objective_torch import Routed
from edge.session import PLAIN, Terms
from protocol import names
from tests.edge.test_session_torch import RESIDENT, TASK, adapter_of


def routed(logits, valid, slot, weight, counted=None, grad=None):
    logits, weight = torch.tensor(logits), torch.tensor(weight, requires_grad=True)
    counted = torch.ones_like(weight) if counted is None else torch.tensor(counted)
    weight.grad = None if grad is None else torch.tensor(grad)
    every = torch.arange(logits.shape[1])
    p = logits.softmax(-1)
    return Routed(torch.tensor(valid), logits, p, every, torch.tensor(slot), weight, counted)


def ln(shares):
    return np.log(np.array(shares, np.float32)).tolist()


# Two tokens and padding over three residents, logits that are logarithms of the probabilities.
HERE = routed(
    ln([[0.5, 0.25, 0.25], [0.7, 0.1, 0.2], [0.1, 0.1, 0.8]]),
    [1.0, 1.0, 0.0],
    [[0, 1], [0, 2], [2, 0]],
    [[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]],
)


def test_label_smoothing_by_hand():
    logits = torch.tensor(ln([[0.5, 0.25, 0.25], [0.7, 0.1, 0.2]]))
    targets, weights = torch.tensor([0, 2]), torch.tensor([1.0, 3.0])
    plain, smooth = objective_torch.answer_losses(logits, targets, weights, 0.3)
    nll = [-math.log(0.5), -math.log(0.2)]
    flat = [-np.log([0.5, 0.25, 0.25]).mean(), -np.log([0.7, 0.1, 0.2]).mean()]
    assert plain.item() == pytest.approx((nll[0] + 3 * nll[1]) / 4)
    each = [0.7 * n + 0.3 * f for n, f in zip(nll, flat, strict=True)]
    assert smooth.item() == pytest.approx((each[0] + 3 * each[1]) / 4)
    one, other = objective_torch.answer_losses(logits, targets, weights, 0.0)
    assert one is other


def test_balances_by_hand():
    f, g = [2 / 4, 1 / 4, 1 / 4], [0.6, 0.175, 0.225]  # padding is not counted
    wanted = 3 * sum(a * b for a, b in zip(f, g, strict=True))
    assert objective_torch.load_balance(HERE).item() == pytest.approx(wanted)
    target = [0.2, 0.3, 0.5]
    kl = sum(t * math.log(t / p) for t, p in zip(target, g, strict=True))
    found = objective_torch.target_balance(HERE, torch.tensor(target), 2)
    assert found.item() == pytest.approx((2 / 3) ** -0.5 * kl, rel=1e-5)
    own = objective_torch.target_balance(HERE, torch.tensor(g), 2)
    assert own.item() == pytest.approx(0, abs=1e-6)


def test_z_loss_by_hand():
    moved = dataclasses.replace(HERE, logits=HERE.logits + torch.tensor([[1.0], [3.0], [50.0]]))
    assert objective_torch.z_loss(moved).item() == pytest.approx((1 + 9) / 2, rel=1e-5)


def test_tokens_count_where_they_are_active():
    assert HERE.tokens().tolist() == [2, 1, 1]
    some = dataclasses.replace(HERE, counted=torch.tensor([[1.0, 0], [1, 1], [1, 1]]))
    assert some.tokens().tolist() == [2, 0, 1]


def test_removal_by_hand():
    layer = routed(
        ln([[0.5, 0.25, 0.25]] * 2), [1.0, 0.0], [[0, 2]] * 2, [[0.6, 0.4]] * 2,
        grad=[[0.3, -0.2]] * 2,
    )  # fmt: skip
    plain = objective_torch.removal_change(layer, False)
    np.testing.assert_allclose(plain, [0.18, 0, 0.08], rtol=1e-6)
    # Without expert 0 all weight goes to expert 2: 0.6 * (-0.2 - 0.3); and the other way round.
    shared = objective_torch.removal_change(layer, True)
    np.testing.assert_allclose(shared, [0.3, 0, 0.2], rtol=1e-6)


@pytest.fixture(scope="module")
def batch(artifact, tokenizer):
    s = artifact.manifest.shape
    rows = [Row("a goal for the team", "sport"), Row("the galaxy", "science")]
    return prompter(tokenizer, TASK, s.batch, s.sequence, s.answers).assemble(rows, None)


@pytest.fixture
def opened(artifact):
    made = session.load_backend("torch").open_train(artifact, RESIDENT)
    made.load(adapter_of(artifact, np.random.default_rng(1)))
    yield made
    made.close()


def step(opened, batch, terms):
    loss, routed = opened.forward_backward(batch, terms)
    return loss, routed, {n: v.copy() for n, v in opened.gradients().items()}


ALL = Terms(
    label_smoothing=0.1, balance=0.3, target_balance=0.2, z_loss=0.05, cap=2, active=1,
    targets={0: np.array([0.1, 0.2, 0.3, 0.4], np.float32)},
)  # fmt: skip


@pytest.mark.parametrize("term", [f.name for f in dataclasses.fields(Terms)][:4] + ["all"])
def test_gradients_are_those_of_the_objective(opened, batch, term, monkeypatch):
    """By differences: of the loss, and of the weighted terms, which the session does not report."""
    terms = ALL if term == "all" else dataclasses.replace(PLAIN, **{term: 0.3})
    terms = dataclasses.replace(terms, active=0, cap=3 if term == "all" else 0)
    _, _, gradients = step(opened, batch, terms)
    parameters, values = opened.parameters(), []
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: values.append(self.item()))
    different = 0
    for name in (names.router_row(0, 3), names.router_row(1, 2), names.output_scale(1)):
        gradient = gradients[name]
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        before = parameters[name][place]
        for sign in (1, -1):
            parameters[name][place] = before + sign * 1e-3
            opened.forward_backward(batch, terms)
        parameters[name][place] = before
        slope = (values[-2] - values[-1]) / 2e-3
        assert slope == pytest.approx(gradient[place], rel=0.05, abs=2e-3), name
        different += abs(gradient[place]) > 1e-3
    assert different


def test_the_loss_stays_the_plain_one(opened, batch):
    plain, _, gradients = step(opened, batch, PLAIN)
    for term in ("label_smoothing", "balance", "target_balance", "z_loss"):
        loss, _, moved = step(opened, batch, dataclasses.replace(PLAIN, **{term: 0.5}))
        assert loss == plain
        change = max(np.abs(moved[n] - v).max() for n, v in gradients.items())
        assert change > 1e-3, term


def test_no_more_experts_than_the_cap(opened, batch):
    _, everyone, _ = step(opened, batch, PLAIN)
    assert all((counts > 0).all() for counts in everyone.values())
    _, routed, gradients = step(opened, batch, Terms(cap=2))
    for layer, ids in RESIDENT.items():
        used = {e for e, count in zip(ids, routed[layer], strict=True) if count}
        assert len(used) == 2
        for name, gradient in gradients.items():
            parsed = names.parse(name)
            if parsed is not None and parsed.layer == layer and parsed.expert not in used:
                assert not gradient.any()


def test_backward_cap_leaves_the_forward_pass_alone(opened, batch):
    loss, everyone, whole = step(opened, batch, PLAIN)
    found, routed, gradients = step(opened, batch, Terms(cap=2, cap_where="backward"))
    assert found == loss
    silent = {}
    for layer, ids in RESIDENT.items():
        np.testing.assert_array_equal(routed[layer], everyone[layer])
        silent[layer] = {e for e in ids if not gradients[names.router_row(layer, e)].any()}
        assert len(silent[layer]) == len(ids) - 2
    for name, gradient in gradients.items():
        parsed = names.parse(name)
        outside = parsed is not None and parsed.expert in silent[parsed.layer]
        np.testing.assert_array_equal(gradient, 0 * whole[name] if outside else whole[name])


def test_fewer_active_experts(opened, batch):
    _, routed, _ = step(opened, batch, Terms(active=1))
    for counts in routed.values():
        assert counts.sum() == batch.valid.sum()
    assert step(opened, batch, Terms(active=2))[0] == step(opened, batch, PLAIN)[0]


def test_the_output_scale_scales(opened, batch, artifact):
    adapter = adapter_of(artifact, np.random.default_rng(1))
    loss, _, _ = step(opened, batch, PLAIN)
    opened.load({**adapter, names.output_scale(0): np.array([0.5], np.float32)})
    assert step(opened, batch, PLAIN)[0] != loss
    opened.load(adapter)  # missing: 1
    assert step(opened, batch, PLAIN)[0] == loss
    assert not set(adapter) & {names.output_scale(layer) for layer in RESIDENT}
    assert not slots.names_of(RESIDENT, [names.output_scale(0)])  # nothing that would be sent


def test_taylor_of_every_resident(opened, batch):
    opened.forward_backward(batch, PLAIN)
    found = opened.taylor()
    assert {n: v.shape for n, v in found.items()} == {n: (len(e),) for n, e in RESIDENT.items()}
    assert all((v >= 0).all() and v.any() for v in found.values())


def test_peak_and_high_by_hand():
    from edge.full_router_torch import full_router

    g = torch.rand(150, 3).softmax(-1)  # ceil(1.5): the second largest
    valid = torch.ones(150)
    valid[g[:, 0].argmax()] = 0
    found = full_router(g, valid, 1, (0, 2))
    order = np.sort(g.numpy()[valid.numpy() > 0], 0)
    np.testing.assert_array_equal(found["peak"], order[-1])
    np.testing.assert_array_equal(found["high"], order[-2])

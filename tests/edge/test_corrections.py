"""FedProx and SCAFFOLD on quadratics whose optima are known."""

import dataclasses

import numpy as np
import pytest

from edge import trainer
from edge.adamw import AdamW
from edge.corrections import Control, pull_back
from edge.session import PLAIN, Batch
from edge.statistics import RoutingSums
from protocol.objective import Objective

NAME = "layers.0.router.1"
BATCH = Batch(*(np.ones((1, 1)),) * 5, labels=np.zeros(1, np.int64))


class Quadratic:
    """f(w) = sum h (w - t)^2 / 2 over one router row; `w` lives in the session as in a real one."""

    def __init__(self, curvature, target):
        self.h, self.t = np.float32(curvature), np.float32(target)
        self.w = {NAME: np.zeros(2, np.float32)}

    def parameters(self):
        return self.w

    def forward_backward(self, batch, terms=PLAIN):
        assert terms == PLAIN  # neither is in a program's graph
        return float((self.h * (self.w[NAME] - self.t) ** 2).sum() / 2), {}

    def gradients(self):
        return {NAME: self.h * (self.w[NAME] - self.t)}

    def taylor(self):
        return {}


def job(rate, **objective):
    return trainer.Job(
        work="train", resident={0: (1,)}, trained={0: (1,)}, steps=10,
        learning_rate=rate, router_learning_rate=rate, seed=0, objective=Objective(**objective),
    )  # fmt: skip


def train(session, rate, steps, control=None, **objective):
    sums = RoutingSums((0,), 2, {0: (1,)})
    trainer.train(session, [BATCH] * steps, job(rate, **objective), sums, lambda: None, control)


def test_the_pull_goes_through_the_optimiser_as_a_gradient_by_hand():
    """The first step of Adam only sees signs; two parameters, one of them pulled back harder than it is pushed."""
    session = Quadratic([1.0, 1.0], [0.0, 0.0])
    session.w[NAME][:] = [1.0, 1.0]
    gradients = {NAME: np.array([1.0, 1.0], np.float32)}
    pull_back(gradients, {NAME: np.float32([1.0, 1.0])}, {NAME: np.float32([0.0, 4.0])}, 0.5)
    assert gradients[NAME].tolist() == [1.5, -0.5]
    # Clipping comes after it: norm sqrt(2.5), so that both shrink alike.
    optimizer = AdamW({NAME: 0.1}, clip=1.0)
    assert optimizer.step(session.w, gradients) == pytest.approx(np.sqrt(2.5))
    np.testing.assert_allclose(session.w[NAME], [0.9, 1.1], rtol=1e-5)


@pytest.mark.parametrize("mu", [0.0, 1.0, 9.0])
def test_fedprox_stops_where_its_objective_is_least(mu):
    """h (w - t)^2 / 2 + mu (w - w_0)^2 / 2 is least at (h t + mu w_0) / (h + mu)."""
    session = Quadratic([1.0, 3.0], [2.0, -1.0])
    session.w[NAME][:] = [1.0, 1.0]
    for rate in (0.05, 0.005, 0.0005):
        prox = dataclasses.replace(job(rate), objective=Objective(prox=mu))
        start = np.array([1.0, 1.0])
        # One lease is one call; the smaller rates only polish it, so they keep its centre.
        optimizer = AdamW({NAME: rate}, clip=1e9)
        for _ in range(600):
            gradients = session.gradients()
            pull_back(gradients, session.w, {NAME: start.astype(np.float32)}, prox.objective.prox)
            optimizer.step(session.w, gradients)
    h, t = np.array([1.0, 3.0]), np.array([2.0, -1.0])
    np.testing.assert_allclose(session.w[NAME], (h * t + mu * start) / (h + mu), atol=2e-3)


def test_the_trainer_pulls_towards_the_values_of_the_lease():
    free, pulled = Quadratic([1, 1], [5, 5]), Quadratic([1, 1], [5, 5])
    train(free, 0.05, 300)
    train(pulled, 0.05, 300, prox=4.0)
    np.testing.assert_allclose(free.w[NAME], 5, atol=0.1)
    np.testing.assert_allclose(pulled.w[NAME], 1, atol=0.1)  # 5 / (1 + 4)


def test_control_variates_are_option_two_under_plain_descent():
    """c_i' = c_i - c + (w_start - w) / (K rate)."""
    rng = np.random.default_rng(0)
    shared, own = ({NAME: rng.normal(size=2).astype(np.float32)} for _ in range(2))
    session = Quadratic([1.0, 2.0], [3.0, -1.0])
    control, rate, steps = Control([NAME], shared, own), np.float32(0.1), 7
    for _ in range(steps):
        gradients = session.gradients()
        control.correct(gradients)
        session.w[NAME] -= rate * gradients[NAME]
    new, change = control.renewed()
    option2 = own[NAME] - shared[NAME] + (0 - session.w[NAME]) / (steps * rate)
    np.testing.assert_allclose(new[NAME], option2, rtol=1e-4)
    np.testing.assert_allclose(change[NAME], new[NAME] - own[NAME], rtol=1e-6)


def federated(scaffold, rounds=60):
    """Two clients, full participation, the plain mean of their values and of their control variates."""
    clients = [Quadratic([4.0, 1.0], [1.0, 0.0]), Quadratic([1.0, 6.0], [-3.0, 2.0])]
    w, c, own = np.zeros(2, np.float32), {NAME: np.zeros(2, np.float32)}, [{}, {}]
    for r in range(rounds):
        rate = 0.05 / (1 + r / 5)
        values, moved = [], []
        for i, client in enumerate(clients):
            client.w[NAME][:] = w
            control = Control([NAME], c, own[i]) if scaffold else None
            train(client, rate, 10, control, scaffold=scaffold)
            values.append(client.w[NAME].copy())
            if control is not None:
                own[i], change = control.renewed()
                moved.append(change[NAME])
        w = np.mean(values, 0).astype(np.float32)
        if scaffold:
            c = {NAME: (c[NAME] + np.mean(moved, 0)).astype(np.float32)}
    return w


def test_scaffold_finds_the_joint_optimum_where_the_average_does_not():
    joint = np.array([(4 * 1 + 1 * -3) / 5, (0 + 6 * 2) / 7])
    assert np.abs(federated(scaffold=True) - joint).max() < 0.05
    assert np.abs(federated(scaffold=False) - joint).max() > 0.3

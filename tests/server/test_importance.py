"""Importance from the statistics of an update to the experts of the next lease."""

import numpy as np
import pytest

from protocol import tensors, update
from server import closing
from server.expert_values import RHO, values
from server.rules import Rules
from server.strategies import STRATEGIES, Fleet
from tests.server.combining import BASE
from tests.server.tiny_store import FULL

SHAPE = (len(BASE.moe_layers), BASE.num_experts)


def chosen(value, slots=2, former=None):
    """What a device of so many slots per layer holds."""
    fleet = Fleet(
        value={"a": value},
        slots={"a": [[FULL] * slots] * len(value)},
        top_k=2,
        coverage=0.0,
        seed=0,
        former=former,
    )
    return STRATEGIES["value"](fleet)["a"]


def told(path, top):
    """An update whose statistics say that the layers' tokens went to the experts by `top` [E]."""
    stats = {name: np.zeros(SHAPE, np.float32) for name in update.STATS}
    stats["mass"] = stats["top"] = np.float32([top] * SHAPE[0])
    path.write_bytes(
        tensors.encode({**{f"stats.{n}": v for n, v in stats.items()}, "facts": np.zeros(1)})
    )
    return {"a": closing.Reported(path=path, tokens=10)}


def test_importance_of_later_rounds_differs_from_the_first_and_decides(tmp_path):
    """0.7 of the old and 0.3 of the new value: after three rounds the new favourites lead by more than the margin."""
    known, held, log = {}, None, []
    for round, top in enumerate([[5, 5, 0, 0], *[[0, 0, 5, 5]] * 3]):
        folded = closing.fold(
            told(tmp_path / f"{round}", top), base=BASE, values=known, trained_counts=None, trained_mass=None,
            adapter={}, beta=0.0, rules=Rules(), relevance="frequency",
        )  # fmt: skip
        known = folded.values
        old = 0.5 * RHO**round
        np.testing.assert_allclose(known["a"], [[old, old, 0.5 - old, 0.5 - old]] * 2, atol=1e-9)
        held = {"a": chosen(known["a"], former=held)}
        log.append([sorted(layer) for layer in held["a"]])
    # 0.245 against 0.255 after two rounds is within the margin of 0.0125, 0.1715 against 0.3285 is not.
    assert log == [[[0, 1]] * 2, [[0, 1]] * 2, [[0, 1]] * 2, [[2, 3]] * 2]


@pytest.mark.parametrize(
    ("lam", "best"), [(0.0, 1), (0.25, 1), (0.45, 1), (0.55, 0), (0.75, 0), (1.0, 0)]
)
def test_lambda_moves_the_choice_from_the_peak_to_the_mean(lam, best):
    # s = lam * mean + (1 - lam) * peak: 0.6 - 0.1 (1 - lam) of expert 0 less 0.4 + 0.1 (1 - lam) of expert 1 is
    # 0.2 lam - 0.2 (1 - lam), which changes its sign at a half.
    stats = {
        "mass": np.array([[6.0, 4.0, 0.0, 0.0]]),
        "peak": np.array([[0.6, 0.8, 0.0, 0.0]]),
        "g_log_g": np.zeros((1, 4)),
    }
    value = values(stats, 0.0, "hfedmoe", lam)
    mean, peak = np.array([0.6, 0.4]), np.array([0.6, 0.8])
    score = lam * mean + (1 - lam) * peak
    np.testing.assert_allclose(value[0, :2] / value[0, :2].sum(), score / score.sum())
    assert chosen(value, slots=1) == [[best]]


def test_an_expert_of_a_rare_topic_is_held():
    """One token in twenty needs expert 3, for certain: its peak keeps it, its frequency and its mean do not."""
    g = np.tile([[0.5, 0.28, 0.21, 0.01]], (20, 1))
    g[0] = [0.0, 0.0, 0.0, 1.0]
    top = g * (g >= np.sort(g, 1)[:, [-2]])
    stats = {"mass": g.sum(0)[None], "top": top.sum(0)[None], "peak": g.max(0)[None],
             "g_log_g": np.zeros((1, 4))}  # fmt: skip
    held = {
        "frequency": chosen(values(stats, 0.0, "frequency")),
        "mean": chosen(values(stats, 0.0, "hfedmoe", 1.0)),
        "blend": chosen(values(stats, 0.0, "hfedmoe", 0.5)),
    }
    assert {how: sorted(layers[0]) for how, layers in held.items()} == {
        "frequency": [0, 1],
        "mean": [0, 1],
        "blend": [0, 3],
    }

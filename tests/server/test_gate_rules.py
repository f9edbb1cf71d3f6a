import numpy as np
import pytest

from protocol import names
from server import gate_rules
from server.aggregate import aggregate
from server.contribution import Contribution
from server.rules import Rules

OLD = {names.router_row(0, e): np.zeros(2, np.float32) for e in range(4)}


def device(name, moved, **more):
    return Contribution(
        device=name,
        tensors={names.router_row(0, e): np.array(r, np.float32) for e, r in moved.items()},
        trained_tokens={(0, e): 1.0 for e in moved},
        **more,
    )


def gate(devices, **how):
    got = aggregate(OLD, devices, (), Rules(prior=0.0, **how))
    return got, [got.adapter[names.router_row(0, e)].tolist() for e in range(4)]


A = device("a", {0: [2, 0], 1: [4, 0]}, rows=30, usage={(0, 0): 0.6, (0, 1): 0.2, (0, 3): 0.2},
           importance={(0, 0): 0.5, (0, 1): 0.5, (0, 3): 0.9})  # fmt: skip
B = device("b", {1: [0, 8], 2: [0, 2]}, rows=10, usage={(0, 1): 0.1, (0, 2): 0.9},
           importance={(0, 1): 0.2, (0, 2): 0.2})  # fmt: skip


def test_rows_move_over_their_holders_by_centred_changes():
    _, rows = gate([A, B])
    # a: -1, +1 in the first coordinate; b: +3, -3 in the second. Row 1 has two holders.
    assert rows == [[-1, 0], [0.5, 1.5], [0, -3], [0, 0]]


def test_plain_rows_and_frozen_rows():
    assert gate([A, B], gate="plain_rows")[1] == [[2, 0], [2, 4], [0, 2], [0, 0]]
    got, _ = gate([A, B], gate="frozen")
    assert all(got.adapter[key] is OLD[key] for key in OLD)


def test_one_weight_per_device():
    # Three quarters of the rows are a's; what b lacks counts as unchanged.
    got, rows = gate([A, B], gate="mean", weighting="rows")
    assert rows == [[1.5, 0], [3, 2], [0, 0.5], [0, 0]]
    # p: a 0.6 * 0.5 + 0.2 * 0.5 = 0.4, b 0.1 * 0.2 + 0.9 * 0.2 = 0.2; of 3 used experts both use 2.
    got, rows = gate([A, B], gate="importance")
    np.testing.assert_allclose(rows, np.array([[4, 0], [8, 8], [0, 2], [0, 0]]) / 3, rtol=1e-6)
    assert got.alpha == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert got.consistency == pytest.approx({"a": 2 / 3, "b": 2 / 3})
    # With tau = 0.15, b does not use expert 1: p_b = 0.18.
    got, _ = gate([A, B], gate="importance", tau=0.15)
    assert got.alpha == pytest.approx({"a": 0.4 / 0.58, "b": 0.18 / 0.58})
    assert got.consistency == pytest.approx({"a": 2 / 3, "b": 1 / 3})


def test_devices_with_disjoint_experts_leave_each_others_rows_bit_identical():
    rng = np.random.default_rng(0)
    old = {k: rng.normal(size=2).astype(np.float32) for k in OLD}
    a, b = device("a", {0: [1, 2], 1: [3, 5]}), device("b", {2: [7, 1], 3: [2, 2]})
    both = aggregate(old, [a, b], (), Rules(prior=0.0)).adapter
    for alone, mine in ((a, (0, 1)), (b, (2, 3))):
        got = aggregate(old, [alone], (), Rules(prior=0.0)).adapter
        for e in range(4):
            key = names.router_row(0, e)
            if e in mine:
                assert both[key].tobytes() == got[key].tobytes()
            else:
                assert got[key] is old[key]


def test_nobody_uses_anything():
    a = device("a", {0: [1, 1]})
    got, rows = gate([a], gate="importance")
    assert rows == [[0, 0]] * 4
    assert got.alpha == {"a": 0.0}


def test_a_row_that_is_far_too_large_is_clipped_or_outvoted():
    devices = [device(n, {0: [v, 0], 1: [-v, 0]}) for n, v in (("a", 1), ("b", 2), ("c", 500))]
    _, rows = gate(devices, clip=2.0)
    assert rows[0] == pytest.approx([(1 + 2 + 4) / 3, 0])
    _, rows = gate(devices, robust="median")
    assert rows[0] == [2, 0]
    assert rows[1] == [-2, 0]


def test_drift_by_hand():
    # Odds of e : 1 and 1 : 1 in one coordinate (d = 1, so nothing is scaled).
    p = np.e / (1 + np.e)
    wanted = p * np.log(2 * p) + (1 - p) * np.log(2 * (1 - p))
    got = gate_rules.drift(np.array([[1.0], [0.0]]), np.array([[3.0], [3.0]]))
    assert got == pytest.approx(wanted)


def test_drift_of_a_round():
    same = device("a", {0: [0, 0], 1: [0, 0]})
    got, _ = gate([same])
    assert got.gate_drift == {"a": 0.0}
    got, _ = gate([A, B])
    assert all(d > 0.01 for d in got.gate_drift.values())
    # A lone device differs from the new gate by a common shift only.
    got, _ = gate([A])
    assert got.gate_drift == pytest.approx({"a": 0.0}, abs=1e-6)
    # The rows of the base take part: where they decide, the same change means less.
    routers = {0: np.array([[50.0, 50], [0, 0], [0, 0], [0, 0]])}
    calm = aggregate(OLD, [A, B], (), Rules(prior=0.0), routers=routers)
    loud = aggregate(OLD, [A, B], (), Rules(prior=0.0))
    assert calm.gate_drift["a"] < 0.1 * loud.gate_drift["a"]

"""SCAFFOLD's variates on the server: means over holders, ranks, the file, and once against the paper's algorithm."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import names
from server import scaffold
from server.scaffold import NOTHING, Control, advance

ROW, OTHER = names.router_row(0, 1), names.router_row(3, 7)
A, B = (names.lora(0, 1, "up", f) for f in names.FACTORS)
SHAPES = {ROW: (3,), OTHER: (3,), A: (4, 6), B: (5, 4)}


@given(st.integers(0, 1000))
def test_c_is_the_mean_over_those_who_trained_the_expert(seed):
    rng = np.random.default_rng(seed)
    control, own = NOTHING, {}
    for _ in range(8):
        changes = {}
        for device in rng.permutation(list("abcd"))[: rng.integers(1, 4)]:
            new = {n: rng.normal(size=3) for n in ((ROW,), (OTHER,), (ROW, OTHER))[rng.integers(3)]}
            old = own.setdefault(str(device), {})
            changes[str(device)] = {
                n: (v - old.get(n, 0)).astype(np.float32) for n, v in new.items()
            }
            old.update(new)
        control = advance(control, changes, SHAPES)
        for name in (ROW, OTHER):
            held = [mine[name] for mine in own.values() if name in mine]
            if held:
                np.testing.assert_allclose(control.variates[name], np.mean(held, 0), atol=1e-5)
            assert (name in control.variates) == bool(held)


def test_a_slot_of_lower_rank_has_the_first_rows_and_columns():
    half = {A: np.ones((2, 6), np.float32), B: np.ones((5, 2), np.float32)}
    full = {A: np.full((4, 6), 3, np.float32), B: np.full((5, 4), 3, np.float32)}
    c = advance(NOTHING, {"a": half, "b": full}, SHAPES).variates
    assert c[A][:, 0].tolist() == [2, 2, 1.5, 1.5]
    assert c[B][0].tolist() == [2, 2, 1.5, 1.5]
    part = scaffold.part_for(Control(variates=c), {**half, ROW: np.zeros(3)})
    assert {n: v.shape for n, v in part.items()} == {
        f"scaffold.{A}": (2, 6),
        f"scaffold.{B}": (5, 2),
    }


def test_the_order_of_devices_does_not_matter():
    rng = np.random.default_rng(0)
    changes = {d: {ROW: rng.normal(size=3).astype(np.float32)} for d in "abc"}
    one = advance(NOTHING, changes, SHAPES)
    two = advance(NOTHING, dict(reversed(changes.items())), SHAPES)
    np.testing.assert_array_equal(one.variates[ROW], two.variates[ROW])


def test_it_survives_its_file(tmp_path):
    control = advance(
        NOTHING, {"a": {ROW: np.ones(3, np.float32)}, "b-2": {OTHER: np.ones(3)}}, SHAPES
    )
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / scaffold.FILE).write_bytes(scaffold.to_bytes(control))
    found = scaffold.read(tmp_path, 4)
    assert found.holders == control.holders == {(0, 1): {"a"}, (3, 7): {"b-2"}}
    assert all(np.array_equal(found.variates[n], control.variates[n]) for n in (ROW, OTHER))
    assert scaffold.read(tmp_path, 3) == NOTHING


@pytest.mark.parametrize("corrected", [True, False])
def test_one_expert_of_two_devices_and_another_of_one(corrected):
    """Plain descent on quadratics h (w - t)^2 / 2 with many local steps: only SCAFFOLD meets the joint optimum, and a
    device that is alone with an expert learns it as fast as ever."""
    h, t = {"a": (8.0, 1.0), "b": (1.0, 0.0)}, {"a": (1.0, 5.0), "b": (-2.0, 0.0)}
    shapes, control = {ROW: (1,), OTHER: (1,)}, NOTHING
    w = {ROW: np.zeros(1), OTHER: np.zeros(1)}
    own = {"a": {}, "b": {}}
    for _ in range(80):
        values, changes = {ROW: [], OTHER: []}, {"a": {}, "b": {}}
        for device in ("a", "b"):
            for i, name in enumerate((ROW, OTHER) if device == "a" else (ROW,)):
                x, c_i = w[name].copy(), own[device].get(name, 0)
                c = control.variates.get(name, 0)
                gradients = []
                for _ in range(10):
                    gradients.append(h[device][i] * (x - t[device][i]))
                    x = x - 0.05 * (gradients[-1] + ((c - c_i) if corrected else 0))
                own[device][name] = np.mean(gradients, 0)
                changes[device][name] = np.float32(own[device][name] - c_i)
                values[name].append(x)
        w = {name: np.mean(found, 0) for name, found in values.items()}
        control = advance(control, changes, shapes)
    joint = (8 * 1 + 1 * -2) / 9
    assert (abs(w[ROW][0] - joint) < 0.01) == corrected
    assert abs(w[OTHER][0] - 5) < 0.05

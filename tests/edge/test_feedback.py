"""What coding loses is sent later: also when the server hands the same product out in other factors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import feedback
from protocol import lora, names, uplink
from server.aggregate import aggregate
from server.contribution import Contribution
from server.rules import Rules

RANK, FEATURES, OUT = 4, 48, 40
A, B, ROW = (
    names.lora(0, 0, "up", "lora_A"),
    names.lora(0, 0, "up", "lora_B"),
    names.router_row(0, 0),
)


def arrived(coded, change, kind):
    return uplink.decode(coded.tensors, {n: v.shape for n, v in change.items()}, kind)


def test_a_residual_by_hand():
    change = {ROW: np.array([7.0, 0.4], np.float32)}  # int4: scale 1, the 0.4 is lost
    kept, seen = {}, []
    for _ in range(5):
        coded = feedback.code(change, {}, kept, "int4")
        kept = coded.kept
        seen.append(arrived(coded, change, "int4")[ROW][1])
    assert seen == [0, 1, 0, 1, 0]  # 5 * 0.4 = 2
    np.testing.assert_allclose(kept[f"residual.{ROW}"], [0, 0], atol=1e-5)


@given(st.integers(0, 1000), st.sampled_from(uplink.KINDS))
def test_the_sum_of_what_arrives_is_one_rounding_off(seed, kind):
    rng = np.random.default_rng(seed)
    kept, true, seen = {}, 0, 0
    for _ in range(12):
        row = (0.01 * rng.normal(size=90) * np.exp(2 * rng.normal(size=90))).astype(np.float32)
        coded = feedback.code({ROW: row}, {}, kept, kind)
        kept, true = coded.kept, true + row
        seen = seen + arrived(coded, {ROW: row}, kind)[ROW]
    np.testing.assert_allclose(true - seen, kept[f"residual.{ROW}"], atol=1e-4)


@given(st.integers(0, 1000))
def test_a_turned_residual_is_the_same_product(seed):
    """B A is also (B M^-1)(M A): residuals follow, whatever M is."""
    rng = np.random.default_rng(seed)
    a, e_a = rng.normal(size=(2, RANK, FEATURES)).astype(np.float32)
    b, e_b = rng.normal(size=(2, OUT, RANK)).astype(np.float32)
    turn = np.linalg.qr(rng.normal(size=(RANK, RANK)))[0] * np.exp(rng.normal(size=(RANK, 1)) / 2)
    new_a, new_b = (turn @ a).astype(np.float32), (b @ np.linalg.inv(turn)).astype(np.float32)
    np.testing.assert_allclose(
        feedback.turned(e_b, "lora_B", a, new_a) @ new_a, e_b @ a, rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(
        new_b @ feedback.turned(e_a, "lora_A", a, new_a), b @ e_a, rtol=1e-3, atol=1e-3
    )


def test_rows_that_are_gone_take_their_residual_with_them():
    a = np.eye(4, 8, dtype=np.float32)
    assert not feedback.turned(np.ones((3, 4), np.float32), "lora_B", a, a[:, ::-1].copy()).any()
    assert not feedback.turned(np.ones((4, 8), np.float32), "lora_A", a, a[:, ::-1].copy()).any()


def test_only_what_fits_is_carried():
    a = np.eye(2, 8, dtype=np.float32)
    change = {A: np.ones((2, 8), np.float32), ROW: np.ones(8, np.float32)}
    kept = feedback.code(change, {A: a}, {}, "int4").kept
    assert set(kept) == {f"residual.{A}", f"residual.{ROW}", f"basis.{A}"}
    kept[f"residual.{A}"][:] = 1
    assert set(feedback.carried(kept, {A: a}, change)) == {A, ROW}
    # A slot of rank 1 this time; a row that is not trained; a basis that was not kept.
    narrow = {A: np.ones((1, 8), np.float32)}
    assert feedback.carried(kept, {A: a[:1]}, narrow) == {}
    del kept[f"basis.{A}"]
    assert set(feedback.carried(kept, {A: a}, change)) == {ROW}


def test_the_residual_of_a_factor_that_has_not_its_turn_waits():
    rng = np.random.default_rng(0)
    adapter = {A: rng.normal(size=(2, 8)).astype(np.float32)}
    step = {
        A: rng.normal(size=(2, 8)).astype(np.float32),
        B: rng.normal(size=(5, 2)).astype(np.float32),
    }
    both = feedback.code(step, adapter, {}, "int4").kept
    only_a = feedback.code({A: step[A]}, adapter, both, "int4").kept
    want = both[f"residual.{B}"] @ both[f"basis.{A}"]  # less what the moved rows no longer reach
    moved = only_a[f"basis.{A}"]
    reach = np.linalg.pinv(moved) @ moved
    np.testing.assert_allclose(only_a[f"residual.{B}"] @ moved, want @ reach, atol=1e-5)
    again = feedback.code({B: step[B]}, {A: moved}, only_a, "int4")
    owed = feedback.carried(only_a, {A: moved}, {B: step[B]})[B]
    seen = arrived(again, {B: step[B]}, "int4")[B]
    np.testing.assert_allclose(again.kept[f"residual.{B}"], step[B] + owed - seen, atol=1e-5)
    assert f"residual.{A}" in again.kept
    # Of another expert, nothing waits.
    assert not any(
        "experts.0" in n for n in feedback.code({ROW: step[A][0]}, {}, both, "int4").kept
    )


def test_adapter_experts_are_carried_as_they_are():
    """Their factors are averaged one by one, nothing turns them."""
    name = names.lora(0, 0, "adapter", "lora_A")
    change = {name: np.float32([[7.0, 0.4]])}
    kept = feedback.code(change, {name: np.ones((1, 2), np.float32)}, {}, "int4").kept
    assert set(kept) == {f"residual.{name}"}
    other = {name: -np.ones((1, 2), np.float32)}
    np.testing.assert_allclose(feedback.carried(kept, other, change)[name], [[0, 0.4]], atol=1e-6)


def lost(mode, kind, rule, rounds=60, seed=0):
    """Norm of the sum of true product changes less the sum of those that arrived, beside that of the first.

    One device whose gradient always points the same way, with a few strong outputs and many weak ones, so that plain
    rounding loses the weak ones every time; a second, random one shares the expert. The server combines them by
    `rule`, which under "svd" hands out other factors, with other signs, in every round.
    """
    rng = np.random.default_rng(seed)
    pull = np.exp(1.5 * rng.normal(size=(OUT, 1))) * (
        rng.normal(size=(OUT, 2)) @ rng.normal(size=(2, FEATURES))
    )
    adapter = {
        A: lora.fresh_a(A, RANK, FEATURES),
        B: rng.normal(0, 0.05, (OUT, RANK)).astype(np.float32),
        ROW: np.zeros(FEATURES, np.float32),
    }
    kept, owed, total = {}, np.zeros((OUT, FEATURES)), np.zeros((OUT, FEATURES))
    for _ in range(rounds):
        a, b = adapter[A].astype(np.float64), adapter[B].astype(np.float64)
        noisy = pull + 0.3 * np.abs(pull).mean() * rng.normal(size=pull.shape)
        step_a, step_b = b.T @ noisy, noisy @ a.T
        change = {
            A: (0.003 * step_a / np.abs(step_a).max()).astype(np.float32),
            B: (0.01 * step_b / np.abs(step_b).max()).astype(np.float32),
        }
        if mode == "nothing":
            seen = uplink.seen_by_server(change, kind)
        elif mode == "as it is":
            whole = {n: v + kept.get(n, 0) for n, v in change.items()}
            seen = uplink.seen_by_server(whole, kind)
            kept = {n: whole[n] - seen[n] for n in whole}
        else:
            coded = feedback.code(change, adapter, kept, kind)
            kept, seen = coded.kept, arrived(coded, change, kind)
        true = (b + change[B]) @ (a + change[A]) - b @ a
        owed += true - ((b + seen[B]) @ (a + seen[A]) - b @ a)
        total += true
        mine = {A: adapter[A] + seen[A], B: adapter[B] + seen[B], ROW: adapter[ROW]}
        other = {
            A: adapter[A] + rng.normal(0, 0.05, (RANK, FEATURES)).astype(np.float32),
            B: adapter[B] + rng.normal(0, 0.02 * np.abs(b).max(), (OUT, RANK)).astype(np.float32),
            ROW: adapter[ROW],
        }
        both = [
            Contribution(device=name, tensors=tensors, trained_tokens={(0, 0): 1.0})
            for name, tensors in (("a", mine), ("b", other))
        ]
        adapter = aggregate(adapter, both, ("up",), Rules(lora=rule, prior=0.0)).adapter
    return np.linalg.norm(owed) / np.linalg.norm(total)


@pytest.mark.parametrize("rule", ["svd", "factors"])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.002), ("int4", 0.012)])
def test_feedback_tracks_the_true_sum_of_products(rule, kind, most):
    turned = np.mean([lost("turned", kind, rule, seed=s) for s in range(3)])
    nothing = np.mean([lost("nothing", kind, rule, seed=s) for s in range(3)])
    plain = np.mean([lost("as it is", kind, rule, seed=s) for s in range(3)])
    assert turned < most
    assert turned < 0.5 * nothing
    if rule == "svd":
        assert (
            turned < 0.8 * plain
        )  # residuals in the factors of another round are half as good, or worse

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import lora
from server import lora_rules, stacking

RANKS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def made_up(seed, ranks, left=0.9, rank=4, out=10, into=7):
    """Old factors of rank 4 and holders whose shares sum to `left`."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rank, into)).astype(np.float32)
    b = rng.normal(size=(out, rank)).astype(np.float32)
    shares = rng.dirichlet(np.ones(len(ranks))) * left
    holders = [
        (
            (a[:r] + rng.normal(size=(r, into))).astype(np.float32),
            (b[:, :r] + rng.normal(size=(out, r))).astype(np.float32),
            float(w),
        )
        for r, w in zip(ranks, shares, strict=True)
    ]
    return a, b, holders


def whole(a, b, holders):
    """Products of the holders with the old tail, and their shares; the old value comes last."""
    wide_a, wide_b = a.astype(float), b.astype(float)
    products = [
        (y.astype(float) @ x + wide_b[:, len(x) :] @ wide_a[len(x) :], w) for x, y, w in holders
    ]
    return [*products, (wide_b @ wide_a, 1 - sum(w for _, w in products))]


def norm(x):
    return np.linalg.norm(x)


@given(st.integers(0, 2**31), RANKS, st.sampled_from([0.3, 1.0]))
@settings(max_examples=40)
def test_the_bias_of_factor_averaging_is_what_the_identity_says(seed, ranks, left):
    a, b, holders = made_up(seed, ranks, left)
    products = whole(a, b, holders)
    average = sum(w * p for p, w in products)
    mean_a = lora_rules.mean(a, [(x, w) for x, _, w in holders]).astype(float)
    mean_b = lora_rules.mean(b, [(y, w) for _, y, w in holders]).astype(float)
    residual, update = lora_rules.bias(a, b, holders)
    assert residual == pytest.approx(norm(average - mean_b @ mean_a), rel=1e-4, abs=1e-5)
    assert update == pytest.approx(norm(average - products[-1][0]), rel=1e-6, abs=1e-6)


def test_the_bias_by_hand():
    # Halves of (1, 1) and (3, 5): the products' mean is 8, that of the factors 2 * 3 = 6.
    holders = [(np.full((1, 1), x), np.full((1, 1), y), 0.5) for x, y in ((1.0, 1.0), (3.0, 5.0))]
    old = np.zeros((1, 1), np.float32)
    assert lora_rules.bias(old, old, holders) == pytest.approx((2.0, 8.0))


def test_one_holder_or_one_factor_gives_no_bias():
    a, b, holders = made_up(1, [4], left=1.0)
    assert lora_rules.bias(a, b, holders)[0] == pytest.approx(0, abs=1e-6)
    _, _, holders = made_up(2, [4, 2, 3])
    for frozen in (
        [(a[: len(x)], y, w) for x, y, w in holders],
        [(x, b[:, : len(x)], w) for x, _, w in holders],
    ):
        assert lora_rules.bias(a, b, frozen)[0] == pytest.approx(0, abs=1e-5)


@given(st.integers(0, 2**31), RANKS)
@settings(max_examples=40)
def test_a_stack_is_exact_for_any_ranks(seed, ranks):
    a, b, holders = made_up(seed, ranks)
    stacked_a, stacked_b = stacking.stack(a, b, holders)
    wanted = sum(w * p for p, w in whole(a, b, holders))
    np.testing.assert_allclose(stacked_b.astype(float) @ stacked_a, wanted, atol=1e-4)
    zero = np.zeros_like(b)
    assert len(stacking.stack(a, zero, holders)[0]) == sum(ranks)


def test_absorbing_a_stack_leaves_the_model_as_it_is():
    a, b, holders = made_up(3, [2, 4])
    key_a, key_b = (f"layers.0.experts.1.up.lora_{f}" for f in "AB")
    adapter = dict(zip((key_a, key_b), stacking.stack(a, b, holders), strict=True))
    wanted = lora.delta(adapter[key_a], adapter[key_b])
    before = np.ones_like(wanted)
    dense = {(0, 1, "up"): before}
    after = stacking.absorb(adapter, [(0, 1)], ("up",), dense, rank=4, round=2)
    now = dense[0, 1, "up"] + lora.delta(after[key_a], after[key_b])
    np.testing.assert_allclose(now, 1 + wanted)
    assert (before == 1).all()
    again = stacking.absorb(adapter, [(0, 1)], ("up",), {}, rank=4, round=3)
    assert (again[key_a] != after[key_a]).any()


@given(st.integers(0, 2**31), RANKS)
@settings(max_examples=40)
def test_flex_counts_what_a_device_lacks_as_zero(seed, ranks):
    a, b, holders = made_up(seed, ranks)
    new_a, new_b, tail = lora_rules.product(a, b, holders, tail_vote=False)
    dense = sum(w * (y.astype(float) @ x) for x, y, w in holders)
    dense = dense + (1 - sum(w for _, _, w in holders)) * (b.astype(float) @ a)
    u, s, vt = np.linalg.svd(dense)
    np.testing.assert_allclose(new_b @ new_a, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-4)
    assert tail == pytest.approx((s[4:] ** 2).sum() / (s**2).sum(), abs=1e-6)
    # A device of rank 2 is given the best product of rank 2.
    np.testing.assert_allclose(
        new_b[:, :2].astype(float) @ new_a[:2], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-4
    )


@given(st.integers(0, 2**31), RANKS)
@settings(max_examples=25)
def test_a_norm_by_gram_matrices(seed, ranks):
    rng = np.random.default_rng(seed)
    left, right = [rng.normal(size=(6, r)) for r in ranks], [rng.normal(size=(r, 5)) for r in ranks]
    wanted = norm(sum(x @ y for x, y in zip(left, right, strict=True)))
    assert lora_rules.product_norm(left, right) == pytest.approx(wanted)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import names
from server import adapters
from server.aggregate import Contribution, aggregate, centred, reproject
from tests.server.tiny_store import RANK, base_index

BASE = base_index()


def delta(adapter, layer, expert, projection):
    a = adapter[names.lora(layer, expert, projection, "lora_A")].astype(np.float64)
    b = adapter[names.lora(layer, expert, projection, "lora_B")].astype(np.float64)
    return b @ a


def contribution(device, keys, seed, tokens=10.0, scale=0.1):
    """New random values for the experts `keys` = [(layer, expert)]."""
    rng = np.random.default_rng(seed)
    made = {}
    for layer, e in keys:
        for p in names.PROJECTIONS:
            out, into = BASE.features(p)
            made[names.lora(layer, e, p, "lora_A")] = rng.normal(size=(RANK, into), scale=scale)
            made[names.lora(layer, e, p, "lora_B")] = rng.normal(size=(out, RANK), scale=scale)
        made[names.router_row(layer, e)] = rng.normal(size=BASE.hidden, scale=scale)
    return Contribution(
        device=device,
        tensors={k: v.astype(np.float32) for k, v in made.items()},
        weights=dict.fromkeys(keys, tokens),
    )


def start(seed=None):
    adapter = adapters.fresh(BASE, RANK)
    if seed is not None:
        rng = np.random.default_rng(seed)
        adapter = {
            k: v + rng.normal(size=v.shape, scale=0.05).astype(np.float32)
            for k, v in adapter.items()
        }
    return adapter


def test_two_devices_with_disjoint_experts_leave_each_other_bit_identical():
    old = start(1)
    a, b = contribution("a", [(0, 0), (1, 2)], 1), contribution("b", [(0, 3), (1, 1)], 2, 300.0)
    both = aggregate(old, [a, b], prior=0.0).adapter
    alone = aggregate(old, [a], prior=0.0).adapter
    touched = set(a.tensors) | set(b.tensors)
    for key in old:
        if key not in touched:
            assert both[key] is old[key]
    for key in a.tensors:
        np.testing.assert_array_equal(both[key], alone[key])
    for key in b.tensors:
        assert alone[key] is old[key]


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.05, 1.0]), st.floats(1, 1e4))
@settings(max_examples=25)
def test_a_lone_contributor_arrives_undiluted_up_to_the_prior(seed, prior, tokens):
    old = start(seed)
    c = contribution("a", [(0, 1)], seed + 1, tokens)
    result = aggregate(old, [c], prior=prior)
    share = 1 / (1 + prior)
    assert result.prior_mass == pytest.approx(prior * tokens)
    for p in names.PROJECTIONS:
        before, wanted = delta(old, 0, 1, p), delta(c.tensors, 0, 1, p)
        full = before + share * (wanted - before)
        u, s, vt = np.linalg.svd(full)
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]  # the best that rank R can hold
        np.testing.assert_allclose(delta(result.adapter, 0, 1, p), best, atol=1e-5)


def test_weights_by_hand():
    # 1 token says 0, 3 tokens say 4: mean 3. With a prior of one median mass (4 tokens) at 0: 1.5.
    keys = [(0, 0)]
    old = {k: np.zeros_like(v) for k, v in start().items()}
    a, b = contribution("a", keys, 1, 1.0), contribution("b", keys, 2, 3.0)
    for c, value in ((a, 0.0), (b, 4.0)):
        for key in c.tensors:
            c.tensors[key][:] = value
    for prior, wanted in ((0.0, 3.0), (1.0, 1.5)):
        got = aggregate(old, [a, b], rule="factors", prior=prior).adapter
        for key in a.tensors:
            if "lora" in key:
                np.testing.assert_allclose(got[key], wanted)
            else:  # a single row less its own mean is nothing
                np.testing.assert_array_equal(got[key], 0)


@given(st.permutations(range(4)), st.sampled_from(["svd", "factors"]))
@settings(max_examples=20)
def test_the_order_of_updates_does_not_matter(order, rule):
    old = start(5)
    made = [contribution(f"d{i}", [(0, i % 3), (1, 0)], i, 5.0 + i) for i in range(4)]
    wanted = aggregate(old, made, rule=rule).adapter
    got = aggregate(old, [made[i] for i in order], rule=rule).adapter
    assert all(np.array_equal(got[k], wanted[k]) for k in wanted)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=30)
def test_the_qr_core_equals_a_dense_svd(seed, parts, rank):
    rng = np.random.default_rng(seed)
    left = [rng.normal(size=(12, rank)) for _ in range(parts)]
    right = [rng.normal(size=(rank, 9)) for _ in range(parts)]
    a, b, tail = reproject(left, right, rank)
    u, s, vt = np.linalg.svd(sum(x @ y for x, y in zip(left, right, strict=True)))
    np.testing.assert_allclose(b @ a, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)
    assert tail == pytest.approx((s[rank:] ** 2).sum() / (s**2).sum(), abs=1e-9)


def test_directions_of_no_weight_stay_trainable():
    a, b, tail = reproject([np.zeros((6, 3))], [np.random.default_rng(0).normal(size=(3, 8))], 3)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1 / np.sqrt(3))
    assert not b.any()
    assert tail == 0


def test_router_rows_are_centred_over_the_devices_rows():
    moved = centred({e: np.full(3, float(e)) for e in (1, 2, 6)})
    np.testing.assert_allclose(sum(moved.values()), 0, atol=1e-12)
    # A shift that all rows share is invisible to softmax and must not reach the adapter.
    old = start()
    c = contribution("a", [(0, 0), (0, 1)], 3)
    for e in (0, 1):
        c.tensors[names.router_row(0, e)][:] = 7.0
    got = aggregate(old, [c], prior=0.0).adapter
    for e in (0, 1):
        np.testing.assert_allclose(got[names.router_row(0, e)], 0, atol=1e-6)


def test_an_expert_without_gradient_tokens_is_not_touched():
    old = start(2)
    c = contribution("a", [(0, 0)], 1, tokens=0.0)
    result = aggregate(old, [c])
    assert all(result.adapter[k] is old[k] for k in old)

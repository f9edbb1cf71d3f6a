import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import names, tensors
from server import adapters
from server import aggregate as aggregation
from server.contribution import Contribution
from server.gate_rules import centred
from server.lora_rules import reproject
from server.rules import Rules
from tests.server.combining import BASE, contribution, delta, start
from tests.server.tiny_store import RANK


def aggregate(old, contributions, **how):
    return aggregation.aggregate(old, contributions, BASE.projections, Rules(**how))


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
    for p in BASE.projections:
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
        got = aggregate(old, [a, b], lora="factors", prior=prior).adapter
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
    wanted = aggregate(old, made, lora=rule).adapter
    got = aggregate(old, [made[i] for i in order], lora=rule).adapter
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


def at_rank(adapter, rank):
    """The best that rank `rank` can hold of every product, as the SVD rule leaves it."""
    out = dict(adapter)
    for layer in BASE.moe_layers:
        for e in range(BASE.num_experts):
            for p in BASE.projections:
                a, b = (names.lora(layer, e, p, f) for f in names.FACTORS)
                new_a, new_b, _ = reproject([adapter[b]], [adapter[a]], rank)
                out[a], out[b] = new_a.astype(np.float32), new_b.astype(np.float32)
    return out


def unchanged(adapter, device, keys, rank, tokens=10.0):
    """What a device of this rank sends when it has changed nothing."""
    made = {}
    for layer, e in keys:
        for p in BASE.projections:
            a, b = (names.lora(layer, e, p, f) for f in names.FACTORS)
            made[a], made[b] = adapter[a][:rank], adapter[b][:, :rank]
        made[names.router_row(layer, e)] = adapter[names.router_row(layer, e)]
    return Contribution(device=device, tensors=made, trained_tokens=dict.fromkeys(keys, tokens))


def by_hand(rank_of_a, rank_of_b):
    """Products of one expert: global diag(8, 4), device a diag(2), device b diag(0, 6); A is the unit matrix."""
    key_a, key_b = (names.lora(0, 0, "down", f) for f in names.FACTORS)

    def factors(*diagonal):
        a, b = np.eye(2, 8), np.zeros((16, 2))
        b[: len(diagonal), : len(diagonal)] = np.diag(diagonal)
        return a.astype(np.float32), b.astype(np.float32)

    old = start()
    old[key_a], old[key_b] = factors(8, 4)
    made = []
    for name, rank, diagonal in (("a", rank_of_a, (2,)), ("b", rank_of_b, (0, 6))):
        c = unchanged(old, name, [(0, 0)], RANK, 1.0)
        a, b = factors(*diagonal)
        made.append(
            Contribution(
                device=name,
                tensors={**c.tensors, key_a: a[:rank], key_b: b[:, :rank]},
                trained_tokens=c.trained_tokens,
            )
        )
    return old, made


@pytest.mark.parametrize(
    ("ranks", "prior", "wanted"),
    [
        # Both have all of it: the mean of diag(2, 0) and diag(0, 6).
        ((2, 2), 0.0, (1, 3)),
        # a knows one direction only: it stands for diag(2, 4).
        ((1, 2), 0.0, (1, 5)),
        # Half the weight is the prior's, for diag(8, 4).
        ((1, 2), 1.0, (4.5, 4.5)),
    ],
)
@pytest.mark.parametrize("rule", ["svd", "factors"])
def test_a_low_rank_does_not_erase_the_tail_by_hand(ranks, prior, wanted, rule):
    old, made = by_hand(*ranks)
    got = aggregate(old, made, lora=rule, prior=prior)
    assert got.prior_mass == 2 * prior
    found = delta(got.adapter, 0, 0, "down")
    np.testing.assert_allclose(np.diag(found)[:2], wanted, atol=1e-5)
    np.testing.assert_allclose(
        found - np.diag(np.diag(found)[:8].tolist() + [0] * 8)[:, :8], 0, atol=1e-5
    )


@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from(["svd", "factors"]),
)
@settings(max_examples=25)
def test_who_changes_nothing_moves_nothing_whatever_its_rank(seed, ranks, prior, rule):
    old = at_rank(start(seed, rank=4), 4)
    made = [unchanged(old, f"d{i}", [(0, 1)], rank, 5.0 + i) for i, rank in enumerate(ranks)]
    new = aggregate(old, made, prior=prior, lora=rule).adapter
    for p in BASE.projections:
        np.testing.assert_allclose(delta(new, 0, 1, p), delta(old, 0, 1, p), atol=1e-6)
    np.testing.assert_array_equal(new[names.router_row(0, 1)], old[names.router_row(0, 1)])


@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=3))
@settings(max_examples=25)
def test_the_products_are_those_of_a_dense_sum(seed, ranks):
    old = start(seed, rank=4)
    made = [
        contribution(f"d{i}", [(1, 2)], seed + i, 1.0 + i, rank=rank)
        for i, rank in enumerate(ranks)
    ]
    got = aggregate(old, made, prior=0.3)
    total = sum(1.0 + i for i in range(len(ranks))) + got.prior_mass
    for p in BASE.projections:
        a, b = (old[names.lora(1, 2, p, f)].astype(float) for f in names.FACTORS)
        dense = got.prior_mass * (b @ a)
        for i, (c, rank) in enumerate(zip(made, ranks, strict=True)):
            dense += (1.0 + i) * (delta(c.tensors, 1, 2, p) + b[:, rank:] @ a[rank:])
        u, s, vt = np.linalg.svd(dense / total)
        wanted = (u[:, :4] * s[:4]) @ vt[:4]
        np.testing.assert_allclose(delta(got.adapter, 1, 2, p), wanted, atol=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=25)
def test_the_first_rows_are_the_best_factors_of_a_lower_rank(seed, rank):
    adapter = at_rank(start(seed, rank=4), 4)
    part = tensors.decode(adapters.slice_for(adapter, {(0, 0): rank}, BASE))
    for p in BASE.projections:
        u, s, vt = np.linalg.svd(delta(adapter, 0, 0, p))
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(delta(part, 0, 0, p), best, atol=1e-6)


def test_directions_that_only_a_low_rank_has_trained_leave_the_others_trainable():
    old = start(rank=4)  # B is zero: there is no tail to keep
    made = [contribution("a", [(0, 0)], 1, rank=1)]
    new = aggregate(old, made, prior=0.0).adapter
    for p in BASE.projections:
        a, b = (new[names.lora(0, 0, p, f)] for f in names.FACTORS)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), 1 / np.sqrt(3), rtol=1e-5)
        np.testing.assert_allclose(delta(new, 0, 0, p), delta(made[0].tensors, 0, 0, p), atol=1e-6)
        assert not b[:, 1:].any() or np.abs(b[:, 1:]).max() < 1e-7


@pytest.mark.parametrize("rule", ["svd", "factors"])
@pytest.mark.parametrize("prior", [0.0, 0.05])
def test_one_rank_for_all_gives_the_bits_of_the_rule_without_ranks(rule, prior):
    old = start(9)
    made = [contribution(f"d{i}", [(0, i % 2), (1, 0)], i, 3.0 + i) for i in range(4)]
    got = aggregate(old, made, lora=rule, prior=prior)
    for layer, e in ((0, 0), (0, 1), (1, 0)):
        members = [c for c in made if (layer, e) in c.trained_tokens]
        total = got.prior_mass + sum(c.trained_tokens[layer, e] for c in members)
        shares = [c.trained_tokens[layer, e] / total for c in members]
        rest = 1.0 - sum(shares)
        for p in BASE.projections:
            a, b = (names.lora(layer, e, p, f) for f in names.FACTORS)
            if rule == "factors":
                for key in (a, b):
                    mean = old[key].astype(np.float64)
                    change = sum(
                        w * (c.tensors[key] - mean) for c, w in zip(members, shares, strict=True)
                    )
                    np.testing.assert_array_equal(
                        got.adapter[key], (mean + change).astype(np.float32)
                    )
                continue
            left = [
                w * c.tensors[b].astype(np.float64) for c, w in zip(members, shares, strict=True)
            ]
            right = [c.tensors[a] for c in members]
            if rest > 0:
                left.append(rest * old[b].astype(np.float64))
                right.append(old[a])
            wanted_a, wanted_b, _ = reproject(left, right, RANK)
            np.testing.assert_array_equal(got.adapter[a], wanted_a.astype(np.float32))
            np.testing.assert_array_equal(got.adapter[b], wanted_b.astype(np.float32))


def test_adapter_experts_are_averaged_factor_by_factor():
    key_a, key_b = (names.lora(0, 0, "adapter", f) for f in names.FACTORS)
    row = names.router_row(0, 0)
    old = {key_a: np.zeros((3, 2)), key_b: np.zeros((2, 3)), row: np.zeros(2)}
    made = [
        Contribution(
            device=name,
            tensors={
                key_a: np.full((width, 2), value),
                key_b: np.full((2, width), value),
                row: np.zeros(2),
            },
            trained_tokens={(0, 0): 1.0},
        )
        for name, width, value in (("a", 3, 2.0), ("b", 1, 6.0))
    ]
    got = aggregation.aggregate(old, made, ("adapter",), Rules(prior=0.0)).adapter
    # b has one unit; the other two count as unchanged, that is 0.
    assert got[key_a].tolist() == [[4, 4], [1, 1], [1, 1]]
    assert got[key_b].tolist() == [[4, 1, 1], [4, 1, 1]]

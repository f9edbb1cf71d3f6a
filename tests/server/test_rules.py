"""Every rule of aggregation, the whole way through."""

import tracemalloc
from collections.abc import Mapping
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import lora, names, tensors, update
from protocol.objective import Objective
from server import closing, config, stacking
from server.aggregate import aggregate
from server.contribution import Contribution
from server.rules import Gate, Lora, Rules
from tests.server.combining import BASE, contribution, delta, factor_keys, start
from tests.server.tiny_store import RANK

LORA = get_args(Lora)
GUARDS = [{}, {"robust": "median"}, {"robust": "trimmed"}, {"sign_conflict": "drop"}, {"clip": 1.5}]


def combine(old, made, **how):
    return aggregate(old, made, BASE.projections, Rules(**how))


def with_factors(c, *factors):
    """The contribution with these factors alone."""
    kept = {k: v for k, v in c.tensors.items() if "lora" not in k or k.endswith(factors)}
    return Contribution(device=c.device, tensors=kept, trained_tokens=c.trained_tokens)


@pytest.mark.parametrize("guard", GUARDS, ids=str)
@pytest.mark.parametrize(
    "how", [*({"lora": r} for r in LORA), *({"gate": g} for g in get_args(Gate))], ids=str
)
def test_experts_of_nobody_are_the_same_arrays_and_order_does_not_matter(how, guard):
    old = start(5)
    held = [[(0, 0), (1, 0)], [(0, 0)], [(0, 0), (0, 1)], [(0, 0), (1, 3)]]
    made = [contribution(f"d{i}", keys, i, 5.0 + i, usage={(0, 0): 0.5}, importance={(0, 0): 0.5})
            for i, keys in enumerate(held)]  # fmt: skip
    got = combine(old, made, **how, **guard)
    touched = {k for c in made for k in c.tensors}
    assert set(got.adapter) == set(old)
    assert all(got.adapter[k] is old[k] for k in old if k not in touched)
    other = combine(old, made[::-1], **how, **guard)
    assert all(np.array_equal(other.adapter[k], got.adapter[k]) for k in old)
    assert (other.residual, other.gate_drift, other.alpha) == (
        got.residual, got.gate_drift, got.alpha)  # fmt: skip
    assert all(np.isfinite(v).all() for v in got.adapter.values())


@pytest.mark.parametrize(
    ("rule", "sends", "stays"),
    [
        ("ffa", ("lora_B",), "lora_A"),
        ("alternate", ("lora_B",), "lora_A"),
        ("alternate", ("lora_A",), "lora_B"),
        ("fedsa", ("lora_A",), "lora_B"),
        ("factors", ("lora_A",), "lora_B"),
        # What must not be shared is ignored.
        ("ffa", names.FACTORS, "lora_A"),
        ("fedsa", names.FACTORS, "lora_B"),
    ],
)
def test_a_factor_that_is_not_shared_is_unchanged_and_the_other_exact(rule, sends, stays):
    old = start(2, rank=3)
    made = [
        with_factors(contribution(f"d{i}", [(0, 1)], i, 1.0 + i, rank=1 + i), *sends)
        for i in range(3)
    ]
    got = combine(old, made, lora=rule, prior=0.2)
    total = 6 + got.prior_mass
    for p in BASE.projections:
        a, b = factor_keys(0, 1, p)
        kept, moved = (a, b) if stays == "lora_A" else (b, a)
        assert got.adapter[kept] is old[kept]
        # One factor is common to all, so the mean of the products is the product of the mean.
        wide = {k: old[k].astype(float) for k in (a, b)}
        dense = got.prior_mass * wide[b] @ wide[a]
        for i, c in enumerate(made):
            full = dict(wide)
            value = c.tensors[moved]
            full[moved] = wide[moved].copy()
            full[moved][tuple(slice(n) for n in value.shape)] = value
            dense += (1.0 + i) * full[b] @ full[a]
        np.testing.assert_allclose(delta(got.adapter, 0, 1, p), dense / total, atol=1e-6)
    if len(sends) == 1:
        # Small beside the change; not 0, because the norm is a root of a difference.
        assert got.residual[0, 1] < 1e-5 * got.moved[0, 1]


def test_a_missing_factor_counts_as_unchanged_in_a_product():
    old = start(3)
    c = contribution("a", [(0, 0)], 1)
    for sends in ("lora_A", "lora_B"):
        got = combine(old, [with_factors(c, sends)], prior=0.0)
        for p in BASE.projections:
            key = names.lora(0, 0, p, sends)
            wanted = delta({**old, key: c.tensors[key]}, 0, 0, p)
            np.testing.assert_allclose(delta(got.adapter, 0, 0, p), wanted, atol=1e-6)


def test_used_by_nobody_by_one_by_several():
    # FedMoE, arXiv 2408.11304, algorithm 1: unchanged, copied, averaged by data.
    old = start(4)
    a = contribution("a", [(0, 0), (0, 1)], 1, rows=30)
    b = contribution("b", [(0, 1)], 2, rows=10)
    modular = {"weighting": "rows", "temperature": 0.0, "gate": "plain_rows", "lora": "factors"}
    got = combine(old, [a, b], copy_single=True, **modular).adapter
    for p in BASE.projections:
        for key in factor_keys(0, 0, p):
            assert got[key].tobytes() == a.tensors[key].tobytes()
        for key in factor_keys(0, 2, p):
            assert got[key] is old[key]
    np.testing.assert_allclose(
        got[names.router_row(0, 0)], a.tensors[names.router_row(0, 0)], rtol=1e-6
    )
    got = combine(old, [a, b], prior=0.0, copy_single=True, **modular).adapter
    for key in b.tensors:
        np.testing.assert_allclose(
            got[key], 0.75 * a.tensors[key] + 0.25 * b.tensors[key], atol=1e-6
        )


def test_a_copy_of_a_low_rank_keeps_the_tail():
    old = start(4, rank=3)
    c = contribution("a", [(0, 0)], 1, rank=1)
    got = combine(old, [c], copy_single=True).adapter
    a, b = factor_keys(0, 0, "down")
    np.testing.assert_array_equal(got[a], np.concatenate([c.tensors[a], old[a][1:]]))
    np.testing.assert_array_equal(got[b], np.concatenate([c.tensors[b], old[b][:, 1:]], axis=1))


def test_the_plain_mean_over_all_shrinks_what_few_trained():
    # FFT-MoE: |D_n| / |D| over everybody, 10 of 40 rows; the fixed rule counts those who trained it.
    a, b = factor_keys(0, 0, "adapter")
    old = {a: np.zeros((1, 2), np.float32), b: np.zeros((2, 1), np.float32)}
    new = {k: np.full_like(v, 4) for k, v in old.items()}
    made = [
        Contribution(device="a", tensors=new, trained_tokens={(0, 0): 5.0}, rows=10),
        Contribution(device="b", tensors={}, trained_tokens={}, rows=30),
    ]
    by_rows = {"weighting": "rows", "temperature": 0.0, "prior": 0.0}
    for members, wanted in (("all", 1.0), ("trained", 4.0)):
        got = aggregate(old, made, ("adapter",), Rules(members=members, **by_rows))
        assert got.adapter[a].tolist() == [[wanted, wanted]]
        assert got.adapter[b].tolist() == [[wanted], [wanted]]


def scaled(c, old, factor):
    """The contribution with its products' B moved `factor` times as far."""
    made = {
        k: old[k] + factor * (v - old[k]) if k.endswith("lora_B") else v
        for k, v in c.tensors.items()
    }
    return Contribution(device=c.device, tensors=made, trained_tokens=c.trained_tokens)


def test_a_change_that_is_far_too_large_is_clipped():
    old = start()  # B is zero: a product is all change
    made = [contribution(f"d{i}", [(0, 0)], i) for i in range(3)]
    poisoned = [*made[:2], scaled(made[2], old, 1000.0)]
    norms = [np.sqrt(sum(np.square(delta(c.tensors, 0, 0, p)).sum() for p in BASE.projections))
             for c in poisoned]  # fmt: skip
    got = combine(old, poisoned, clip=2.0, prior=0.0)
    factors = np.minimum(1, 2 * np.median(norms) / norms)
    assert factors[2] < 0.01
    for p in BASE.projections:
        dense = sum(
            f * delta(c.tensors, 0, 0, p) / 3 for f, c in zip(factors, poisoned, strict=True)
        )
        u, s, vt = np.linalg.svd(dense)
        wanted = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        np.testing.assert_allclose(delta(got.adapter, 0, 0, p), wanted, atol=1e-5)
    # A lone holder is measured by the changes of the other experts of its layer.
    lone = [contribution(f"d{i}", [(0, i)], i) for i in range(3)]
    honest = combine(old, lone, clip=3.0).moved
    got = combine(old, [*lone[:2], scaled(lone[2], old, 1000.0)], clip=3.0).moved
    assert got[0, 0] == honest[0, 0]
    assert got[0, 2] < 5 * honest[0, 2]


def test_coordinates_in_conflict_are_left_alone():
    key_a, key_b = factor_keys(0, 0, "adapter")
    old = {key_a: np.zeros((1, 2), np.float32), key_b: np.zeros((2, 1), np.float32)}

    def device(name, first, second):
        made = {key_a: np.array([[first, second]], np.float32), key_b: np.ones((2, 1), np.float32)}
        return Contribution(device=name, tensors=made, trained_tokens={(0, 0): 1.0})

    made = [device("a", 4, 2), device("b", 2, -1)]
    for kind, wanted in (("off", [3, 0.5]), ("drop", [3, 0]), ("scale", [3, 0])):
        got = aggregate(old, made, ("adapter",), Rules(sign_conflict=kind, prior=0.0)).adapter
        assert got[key_a].tolist() == [wanted]
    # In a product, what is dropped is the device's change of its factor.
    key_a, key_b = factor_keys(0, 0, "up")
    old = {key_a: np.ones((1, 2), np.float32), key_b: np.ones((2, 1), np.float32)}
    made = [
        Contribution(
            device=n,
            tensors={key_a: np.array([[1 + x, 1 + y]], np.float32), key_b: old[key_b]},
            trained_tokens={(0, 0): 1.0},
        )
        for n, x, y in (("a", 4, 2), ("b", 2, -2))
    ]
    got = aggregate(old, made, ("up",), Rules(sign_conflict="drop", prior=0.0)).adapter
    np.testing.assert_allclose(got[key_b] @ got[key_a], [[4, 1], [4, 1]], atol=1e-6)


@pytest.mark.parametrize("rule", ["svd", "flex", "factors"])
@pytest.mark.parametrize("kind", ["median", "trimmed"])
def test_a_liar_among_three_is_outvoted_and_two_are_averaged(rule, kind):
    old = start(1)
    honest = contribution("a", [(0, 0)], 1)
    twins = [
        Contribution(device=n, tensors=honest.tensors, trained_tokens=honest.trained_tokens)
        for n in "abcd"
    ]
    liar = contribution("z", [(0, 0)], 9, tokens=1e6, scale=100.0)
    got = combine(old, [*twins, liar], lora=rule, robust=kind, prior=0.0, gate="plain_rows")
    for p in BASE.projections:
        np.testing.assert_allclose(
            delta(got.adapter, 0, 0, p), delta(honest.tensors, 0, 0, p), atol=1e-5
        )
    pair = [contribution(f"d{i}", [(0, 0)], i) for i in range(2)]
    got, plain = (combine(old, pair, lora=rule, robust=k).adapter for k in (kind, "mean"))
    assert all(np.array_equal(got[k], plain[k]) for k in old)


def test_a_robust_product_is_in_the_order_that_low_ranks_need():
    old = start(1, rank=3)
    made = [contribution(f"d{i}", [(0, 0)], i, rank=3) for i in range(3)]
    got, plain = (combine(old, made, lora=rule, robust="median") for rule in ("svd", "factors"))
    for p in BASE.projections:
        np.testing.assert_allclose(
            delta(got.adapter, 0, 0, p), delta(plain.adapter, 0, 0, p), atol=1e-6
        )
        a, b = factor_keys(0, 0, p)
        gram = got.adapter[a] @ got.adapter[a].T
        np.testing.assert_allclose(gram, np.eye(3) / 3, atol=1e-6)
        sizes = np.linalg.norm(got.adapter[b], axis=0)
        assert (np.diff(sizes) <= 0).all()


def test_flex_erases_the_tail_that_svd_keeps():
    old = start(1, rank=3)
    c = contribution("a", [(0, 0)], 1, rank=1)
    svd, flex = (combine(old, [c], lora=rule, prior=0.0).adapter for rule in ("svd", "flex"))
    for p in BASE.projections:
        a, b = (old[k].astype(float) for k in factor_keys(0, 0, p))
        mine = delta(c.tensors, 0, 0, p)
        np.testing.assert_allclose(delta(flex, 0, 0, p), mine, atol=1e-6)
        np.testing.assert_allclose(delta(svd, 0, 0, p), mine + b[:, 1:] @ a[1:], atol=1e-6)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 3), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_a_stack_moves_into_the_weights_exactly(seed, ranks):
    old = start(rank=3)  # every round starts from fresh factors
    made = [contribution(f"d{i}", [(1, 2)], seed + i, 1.0 + i, rank=r) for i, r in enumerate(ranks)]
    got = combine(old, made, lora="stack", prior=0.0)
    dense = {}
    after = stacking.absorb(got.adapter, got.holders, BASE.projections, dense, rank=3, round=1)
    total = sum(1.0 + i for i in range(len(ranks)))
    for p in BASE.projections:
        wanted = sum((1.0 + i) * delta(c.tensors, 1, 2, p) for i, c in enumerate(made)) / total
        np.testing.assert_allclose(dense[1, 2, p], lora.SCALE * wanted, atol=1e-6)
        assert not delta(after, 1, 2, p).any()
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in old.items()}


def test_what_the_round_says_about_itself():
    old = start(7)
    made = [contribution(f"d{i}", [(0, 0), (1, i)], i) for i in range(3)]
    got = combine(old, made, prior=0.0)
    assert got.holders == {(0, 0): 3, (1, 0): 1, (1, 1): 1, (1, 2): 1}
    # Popular experts are biased, those of one holder are not.
    assert got.bias[0, 0] > 0.1
    assert max(got.bias[1, i] for i in range(3)) < 1e-5
    assert got.tail_max == max(got.tail.values()) == got.tail[0, 0] > 0
    plain = combine(old, made, prior=0.0, lora="factors")
    squared = sum(
        np.square(
            sum(delta(c.tensors, 0, 0, p) for c in made) / 3 - delta(plain.adapter, 0, 0, p)
        ).sum()
        for p in BASE.projections
    )
    assert got.residual[0, 0] == pytest.approx(np.sqrt(squared), rel=1e-4)
    quiet = aggregate(old, made, BASE.projections, diagnose=False)
    assert not quiet.residual
    assert not quiet.gate_drift


class Lazy(Mapping):
    """Tensors that exist only while they are read, as those of a memory-mapped file."""

    def __init__(self, shapes, seed):
        self.shapes, self.seed = shapes, seed

    def __getitem__(self, key):
        rng = np.random.default_rng([self.seed, len(key)])
        return rng.normal(size=self.shapes[key]).astype(np.float32)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


def peak_above_result(rule, holders, experts, width=256, rank=8, **how):
    """Bytes at the peak of an aggregation, less those of the new adapter."""
    shapes = {}
    for e in range(experts):
        for key, shape in zip(factor_keys(0, e, "up"), ((rank, width), (width, rank)), strict=True):
            shapes[key] = shape
        shapes[names.router_row(0, e)] = (width,)
    old = {k: np.ones(s, np.float32) for k, s in shapes.items()}
    made = [
        Contribution(
            device=f"d{i:02}",
            tensors=Lazy(shapes, i),
            trained_tokens={(0, e): 1.0 for e in range(experts)},
        )
        for i in range(holders)
    ]
    tracemalloc.start()
    try:
        got = aggregate(old, made, ("up",), Rules(lora=rule, **how), diagnose=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    new = (v for k, v in got.adapter.items() if v is not old[k])
    return peak - sum(v.nbytes for v in new)


@pytest.mark.parametrize("rule", ["factors", "ffa", "alternate", "fedsa"])
def test_memory_of_means_does_not_grow_with_the_devices(rule):
    _warm, few, many = (peak_above_result(rule, holders, 4) for holders in (3, 3, 30))
    update_bytes = 4 * 4 * (2 * 8 * 256 + 256)
    assert many - few < 27 * 4 * 1000  # a share per device and expert
    assert many < 4 * update_bytes


def test_memory_of_products_holds_one_expert_of_all_devices():
    few, many = (peak_above_result("svd", 10, experts) for experts in (2, 16))
    assert many - few < 14 * 10 * 1000 + 14 * 256 * 16  # shares and router sums, no factors
    one = 10 * 8 * 2 * 256 * 8  # float64
    assert few < 6 * one


def write_update(folder, c, rng):
    """The contribution as a file; its statistics are made up."""
    layers, experts = len(BASE.moe_layers), BASE.num_experts
    stats = {name: rng.uniform(0, 1, (layers, experts)).astype(np.float32) for name in update.STATS}
    stats["trained_tokens"][:] = 0
    for (layer, e), n in c.trained_tokens.items():
        stats["trained_tokens"][BASE.moe_layers.index(layer), e] = n
    path = folder / c.device
    facts = np.frombuffer(b"{}", np.uint8)
    path.write_bytes(
        tensors.encode({**c.tensors, **{f"stats.{k}": v for k, v in stats.items()}, "facts": facts})
    )
    return path, stats


def test_updates_on_disk_are_combined_as_those_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    old = start(1)
    made = [contribution(f"d{i}", [(0, 0), (1, i)], i, 4.0 * (1 + i)) for i in range(3)]
    rules = Rules(weighting="rows", temperature=0.5, gate="importance", gate_blend=0.3)
    reported, wanted = {}, []
    for i, c in enumerate(made):
        path, stats = write_update(tmp_path, c, rng)
        reported[c.device] = closing.Reported(path=path, tokens=100, rows=10 + i)
        wanted.append(
            closing.contribution.from_stats(
                c.device,
                c.tensors,
                stats,
                BASE.moe_layers,
                top_k=BASE.top_k,
                rows=10 + i,
                blend=0.3,
            )
        )
    folded = closing.fold(
        reported,
        base=BASE,
        values={},
        trained_counts=None,
        trained_mass=None,
        adapter=old,
        beta=0.1,
        rules=rules,
    )
    expected = aggregate(old, wanted, BASE.projections, rules)
    assert folded.aggregated is not None
    assert folded.aggregated.alpha == expected.alpha
    for key in old:
        assert np.array_equal(folded.aggregated.adapter[key], expected.adapter[key])


def test_flags_reach_the_rules(tmp_path):
    flags = ["--store", str(tmp_path), "--state", str(tmp_path)]
    assert config.parse(flags).rules == Rules()
    more = "--aggregate ffa --gate importance --members sent --weighting rows --temperature 0 --tau 0.1 " \
           "--prior 0 --copy-single --staleness 1 --clip 3 --sign-conflict drop --robust median " \
           "--gate-blend 0.25"  # fmt: skip
    assert config.parse([*flags, *more.split()]).rules == Rules(
        lora="ffa", gate="importance", members="sent", weighting="rows", temperature=0.0, tau=0.1,
        prior=0.0, copy_single=True, staleness=1.0, clip=3.0, sign_conflict="drop",
        robust="median", gate_blend=0.25,
    )  # fmt: skip
    with pytest.raises(config.ConfigError, match="--aggregate stack: .*svd or flex wanted"):
        config.parse([*flags, "--aggregate", "stack"])
    with pytest.raises(config.ConfigError, match=r"--gate-blend 2.0 found, 0 to 1 wanted"):
        config.parse([*flags, "--gate-blend", "2"])


@pytest.mark.parametrize(
    "wrong", [{"lora": "dora"}, {"tau": -0.1}, {"prior": float("nan")}, {"clip": 1e9}]
)
def test_rules_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} .* found, .* wanted"):
        Rules(**wrong)


def test_what_devices_are_asked_for():
    plain = Objective(prox=0.5)
    asked = {r: [Rules(lora=r).objective(plain, i) for i in (1, 2)] for r in LORA}
    assert {r: [o.factors for o in made] for r, made in asked.items()} == {
        **dict.fromkeys(LORA, ["both", "both"]),
        "ffa": ["lora_B", "lora_B"],
        "alternate": ["lora_B", "lora_A"],
    }
    assert [r for r in LORA if asked[r][0].personal] == ["fedsa"]
    assert all(o.prox == 0.5 for made in asked.values() for o in made)

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.coverage import coverage_cv, faded, never_trained
from server.strategies import FIXED, STRATEGIES, Fleet
from server.threshold import ThresholdError
from tests.server.tiny_store import FROZEN, FULL

V = np.array([[0.4, 0.3, 0.2, 0.1]])


def fleet(value, slots, **more):
    settings = {"top_k": 1, "coverage": 0.5, "seed": 0, **more}
    return Fleet(value=value, slots={d: slots for d in value}, **settings)


def test_value_is_sorting_per_layer():
    two = fleet({"a": V, "b": V[:, ::-1]}, [[FULL] * 2])
    assert STRATEGIES["value"](two) == {"a": [[0, 1]], "b": [[3, 2]]}


def test_history_gives_the_slot_for_coverage_to_the_least_trained():
    # Nobody else is there this round, so "coverage" has no reason to look beyond the best.
    one = fleet({"a": V}, [[FULL] * 2], past=np.array([[9.0, 5.0, 0.5, 2.0]]))
    assert STRATEGIES["coverage"](one) == {"a": [[0, 1]]}
    assert STRATEGIES["history"](one) == {"a": [[0, 2]]}


def test_history_counts_this_rounds_holders_too():
    past = np.array([[9.0, 5.0, 0.5, 1.0]])
    two = fleet({"a": V, "b": V}, [[FULL] * 2], past=past)
    assert STRATEGIES["history"](two) == {"a": [[0, 2]], "b": [[0, 3]]}


def test_history_moves_on_from_what_a_device_held_for_coverage():
    one = fleet({"a": V}, [[FULL] * 2], former={"a": [[0, 2]]}, past=np.array([[9, 5, 4.0, 1]]))
    assert STRATEGIES["history"](one) == {"a": [[0, 3]]}


def test_without_a_past_history_is_coverage():
    two = fleet({"a": V, "b": V}, [[FULL] * 3])
    assert STRATEGIES["history"](two) == STRATEGIES["coverage"](two)


def test_random_is_fixed_per_device_and_differs_between_them():
    rng = np.random.default_rng(0)
    names = [f"d{i}" for i in range(40)]
    first = {d: rng.random((2, 16)) for d in names}
    slots = [[FULL] * 4, [FULL, FROZEN]]
    got = STRATEGIES["random"](fleet(first, slots))
    later = {d: rng.random((2, 16)) for d in names[:5]}
    again = STRATEGIES["random"](fleet(later, slots, coverage=0.0))
    assert again == {d: got[d] for d in names[:5]}
    assert STRATEGIES["random"](fleet(first, slots, seed=1)) != got
    assert len({tuple(got[d][0]) for d in names}) > 35
    counts = np.bincount([e for d in names for e in got[d][0]], minlength=16)
    assert counts.sum() == 160
    assert counts.min() > 0


def test_theta_gives_layers_what_they_need():
    sharp, flat = [0.9, 0.1, 0, 0], [0.25] * 4
    one = {"a": np.array([sharp, flat])}
    got = STRATEGIES["theta"](fleet(one, [[FULL] * 3, [FULL] * 2]))
    assert got == {"a": [[0], [0, 1, 2, 3]]}
    with pytest.raises(ThresholdError):
        STRATEGIES["theta"](fleet(one, [[FULL], [FULL]], top_k=2))


@given(st.integers(0, 2**32 - 1), st.sampled_from(FIXED))
@settings(max_examples=60)
def test_every_fixed_strategy_fills_all_slots_and_is_deterministic(seed, name):
    rng = np.random.default_rng(seed)
    slots = [[FULL] * int(n) for n in rng.integers(1, 9, 3)]
    value = {d: rng.random((3, 8)) - 0.2 for d in "abcd"}
    past, prior = rng.random((3, 8)) * 5, rng.random((3, 8))
    asked = fleet(value, slots, past=past, prior=prior, top_k=2)
    got = STRATEGIES[name](asked)
    assert got == STRATEGIES[name](asked)
    for layers in got.values():
        for held, kinds in zip(layers, slots, strict=True):
            assert len(held) == len(set(held)) == len(kinds)


def simulate(strategy, rounds, seed):
    """30 devices of much the same taste, 5 a round, 4 of 16 experts: updates per expert, and the faded mass."""
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(30)]
    common = rng.dirichlet(np.full(16, 0.3), 2)
    taste = {d: 0.85 * common + 0.15 * rng.dirichlet(np.full(16, 0.3), 2) for d in names}
    past, held, updates = None, {}, np.zeros((2, 16))
    for _ in range(rounds):
        there = [str(d) for d in rng.choice(names, 5, replace=False)]
        got = STRATEGIES[strategy](
            Fleet(
                value={d: taste[d] for d in there},
                slots={d: [[FULL] * 4] * 2 for d in there},
                top_k=2,
                coverage=0.5,
                seed=seed,
                former={d: held[d] for d in there if d in held},
                past=past,
            )
        )
        held |= got
        tokens = []
        for d in there:
            trained = np.zeros((2, 16))
            for layer, ids in enumerate(got[d]):
                share = taste[d][layer, ids] + 0.01
                trained[layer, ids] = rng.multinomial(2000, share / share.sum())
            tokens.append(trained)
            updates += trained > 0
        past = faded(past, tokens)
    return updates, past


@pytest.mark.parametrize("seed", range(3))
def test_no_expert_starves_with_few_devices_a_round(seed):
    greedy, _ = simulate("value", 20, seed)
    this_round, lately = simulate("coverage", 20, seed)
    over_rounds, past = simulate("history", 20, seed)
    assert never_trained(greedy) >= 7  # of 32: what greedy choice does
    assert never_trained(over_rounds) == 0
    assert past.min() > 1.5 > lately.min()  # nor was one forgotten lately
    assert coverage_cv(over_rounds) < coverage_cv(this_round) < coverage_cv(greedy)
    # Five devices with two slots each for coverage: four rounds reach all 16 experts of a layer.
    early, _ = simulate("history", 4, seed)
    assert never_trained(early) == 0 < never_trained(simulate("coverage", 4, seed)[0])

"""Grow, shrink and revert, one turn at a time, and a longer run in which all of them happen."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.structure import (
    Change,
    Limits,
    Peer,
    Report,
    Rules,
    State,
    StructureError,
    from_json,
    grown,
    shrunk,
    step,
    to_json,
)

P = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
LIMITS = Limits(least=(1, 1), most=(3, 3), total=6)
RULES = Rules(patience=2, trial=2, rest=3)
LARGE = {"b": Peer(activation=P, experts=4)}  # two more than START
SMALL = {"b": Peer(activation=P, experts=2)}
START = State(held=((0,), (0,)))


def turns(state, scores, peers, rules=RULES, limits=LIMITS):
    changes = []
    for score in scores:
        state, change = step(state, Report(score=score, activation=P), peers, limits, rules)
        changes.append(change)
    return state, changes


def test_nothing_changes_while_scores_rise():
    state, changes = turns(START, [0.1, 0.2, 0.2, 0.3, 0.3, 0.4], LARGE)
    assert changes == [Change()] * 6
    assert (state.held, state.best, state.waited) == (START.held, 0.4, 0)
    assert state.scores == (0.1, 0.2, 0.2, 0.3, 0.3, 0.4)


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_a_plateau_of_patience_turns_makes_it_grow(patience):
    rules = replace(RULES, patience=patience)
    state, changes = turns(START, [0.5] + [0.5] * patience, LARGE, rules)
    # Outside are 0.2, 0.3, 0.4 and 0.3, 0.2, 0.1; the two highest are expert 3 of layer 0 and, of the two 0.3, the
    # first.
    assert changes[:-1] == [Change()] * patience
    assert changes[-1] == Change(kind="grow", added=((0, 2), (0, 3)))
    assert (state.held, state.before, state.tries) == (((0, 2, 3), (0,)), START.held, 1)


def test_a_lower_score_is_no_improvement_and_a_gain_too_small_neither():
    _, changes = turns(START, [0.5, 0.4, 0.45], LARGE)
    assert changes[-1].kind == "grow"  # 0.45 is better than before, but not than the best
    _, changes = turns(START, [0.5, 0.505, 0.509], LARGE, replace(RULES, least_gain=0.01))
    assert changes[-1].kind == "grow"


def test_shrinks_towards_smaller_peers():
    start = State(held=((0, 1, 3), (0, 3)))
    state, changes = turns(start, [0.5, 0.5, 0.5], SMALL)
    # n = 2 - 5. Inside: 0.1, 0.2, 0.4 and 0.4, 0.1; three lowest: of the two 0.1 the last, then the first, then 0.2.
    assert changes[-1] == Change(kind="shrink", removed=((0, 0), (0, 1), (1, 3)))
    assert state.held == ((3,), (0,))


def test_the_target_is_the_rounded_mean_of_the_nearest_only():
    peers = {
        "b": Peer(activation=P, experts=3),
        "c": Peer(activation=P, experts=4),
        "far": Peer(activation=P[:, ::-1].copy(), experts=60),
    }
    rules = replace(RULES, similar=2)
    state, _ = turns(START, [0.5] * 3, peers, rules)
    assert state.experts == 4  # 3.5, halves up
    state, _ = turns(START, [0.5] * 3, {"b": peers["b"]}, rules)
    assert state.experts == 3
    state, changes = turns(START, [0.5] * 6, {"b": Peer(activation=P, experts=2)}, rules)
    assert (state.tries, set(changes)) == (0, {Change()})  # the right size already
    assert turns(START, [0.5] * 6, {}, rules)[0].tries == 0  # nobody to ask


def test_growth_stays_within_the_limits():
    many = {"b": Peer(activation=P, experts=60)}
    state, _ = turns(START, [0.5] * 3, many)
    assert state.held == ((0, 2, 3), (0, 1, 2))  # 3 per layer
    limits = Limits(least=(1, 1), most=(3, 3), total=4)
    state, _ = turns(START, [0.5] * 3, many, limits=limits)
    assert state.held == ((0, 2, 3), (0,))
    limits = Limits(least=(1, 1), most=(1, 1), total=9)
    state, changes = turns(START, [0.5] * 9, many, limits=limits)
    assert (state.held, state.tries, set(changes)) == (START.held, 0, {Change()})


def test_a_change_that_helps_is_kept_and_the_next_may_come():
    state, changes = turns(START, [0.5, 0.5, 0.5, 0.5, 0.6], LARGE)
    assert [c.kind for c in changes] == ["none", "none", "grow", "none", "keep"]
    assert (state.before, state.waited, state.frozen) == (None, 0, False)
    state, changes = turns(state, [0.6, 0.6], SMALL)
    assert changes[-1].kind == "shrink"


def test_freeze_a_failed_change_is_undone_for_good():
    state, changes = turns(START, [0.5] * 5, LARGE)
    assert [c.kind for c in changes] == ["none", "none", "grow", "none", "revert"]
    assert changes[-1] == Change(kind="revert", removed=((0, 2), (0, 3)))
    assert (state.held, state.before, state.frozen, state.tries) == (START.held, None, True, 1)
    state, changes = turns(state, [0.4] * 50, LARGE)
    assert (state.held, set(changes)) == (START.held, {Change()})


def test_retry_a_failed_change_rests_and_others_are_tried():
    rules = replace(RULES, mode="retry")
    state, changes = turns(START, [0.5] * 5, LARGE, rules)
    assert changes[-1].kind == "revert"
    assert not state.frozen
    assert state.resting == {"+0.2": 9, "+0.3": 9}  # turn 5, three turns of rest
    # Plateau again two turns later: the next best two.
    state, changes = turns(state, [0.5] * 2, LARGE, rules)
    assert changes[-1] == Change(kind="grow", added=((0, 1), (1, 1)))
    state, changes = turns(state, [0.5] * 2, LARGE, rules)
    assert changes[-1].kind == "revert"
    # Turn 9: what failed first may be tried again.
    state, changes = turns(state, [0.5] * 2, LARGE, rules)
    assert changes[-1] == Change(kind="grow", added=((0, 2), (0, 3)))
    assert state.tries == 3


def test_retry_a_failed_shrink_rests_too():
    rules = replace(RULES, mode="retry", rest=99)
    start = State(held=((0, 3), (0,)))
    state, _ = turns(start, [0.5] * 5, SMALL, rules)
    assert (state.held, set(state.resting)) == (start.held, {"-0.0"})
    state, changes = turns(state, [0.5] * 2, SMALL, rules)
    assert changes[-1] == Change(kind="shrink", removed=((0, 3),))


def test_when_every_move_rests_it_waits():
    rules = replace(RULES, mode="retry", rest=99)
    limits = Limits(least=(1, 1), most=(2, 1), total=3)
    state = State(held=START.held, resting={"+0.1": 99, "+0.2": 99, "+0.3": 99})
    state, changes = turns(state, [0.5] * 9, LARGE, rules, limits)
    assert (state.tries, set(changes)) == (0, {Change()})


useful = {
    "grows": {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)},
    "shrinks": {(0, 0), (1, 0)},
    "reverts": {(0, 3), (1, 3)},
}


def accuracy(name, held, turn):
    """Rises at first; each useful expert adds, each useless one disturbs."""
    inside = {(layer, e) for layer, ids in enumerate(held) for e in ids}
    good, bad = len(inside & useful[name]), len(inside - useful[name])
    return 0.4 + 0.02 * min(turn, 5) + 0.05 * good - 0.03 * bad


def simulate(mode, rounds=60):
    """Nine devices: three whose structure is off, and peers of each that have found theirs."""
    activation = {
        "grows": np.array([[0.3, 0.3, 0.3, 0.1], [0.3, 0.3, 0.3, 0.1]]),
        "shrinks": np.array([[0.85, 0.05, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]),
        "reverts": np.array([[0.05, 0.05, 0.1, 0.8], [0.05, 0.05, 0.1, 0.8]]),
    }
    settled = {
        "grows": ((0, 1, 2), (0, 1, 2)),
        "shrinks": ((0,), (0,)),
        "reverts": ((2, 3), (2, 3)),
    }
    start = {"grows": ((0,), (0,)), "shrinks": ((0, 1), (0, 2)), "reverts": ((3,), (3,))}
    states = {name: State(held=held) for name, held in start.items()}
    peers = {
        f"{name}-{i}": Peer(activation=activation[name], experts=sum(map(len, settled[name])))
        for name in settled
        for i in range(2)
    }
    log = {name: [] for name in states}
    rules, limits = (
        Rules(mode=mode, patience=3, trial=2, similar=2),
        Limits(least=(1, 1), most=(3, 3), total=6),
    )
    for turn in range(rounds):
        for name, state in states.items():
            score = accuracy(name, state.held, turn)
            report = Report(score=score, activation=activation[name])
            states[name], change = step(state, report, peers, limits, rules)
            # A server that restarts after every round.
            states[name] = from_json(to_json(states[name]), 2, 4)
            if change.kind != "none":
                log[name].append(change.kind)
            assert all(1 <= len(ids) <= 3 for ids in states[name].held)
    return states, log, settled


def test_a_longer_run_grows_shrinks_and_reverts():
    states, log, settled = simulate("freeze")
    assert log == {"grows": ["grow", "keep"], "shrinks": ["shrink", "keep"],
                   "reverts": ["grow", "revert"]}  # fmt: skip
    assert states["grows"].held == settled["grows"]
    assert states["shrinks"].held == settled["shrinks"]
    assert states["reverts"].held == ((3,), (3,))
    assert {name: state.frozen for name, state in states.items()} == {
        "grows": False, "shrinks": False, "reverts": True,
    }  # fmt: skip


def test_a_longer_run_with_retries_tries_again_and_ends_where_it_was():
    states, log, _ = simulate("retry")
    assert log["grows"] == ["grow", "keep"]
    assert log["reverts"][:6] == ["grow", "revert"] * 3
    last = states["reverts"]
    assert (last.before or last.held) == ((3,), (3,))
    assert not last.frozen


def test_the_history_is_bounded():
    state, _ = turns(START, np.linspace(0, 1, 200).tolist(), LARGE)
    assert (len(state.scores), state.turns, state.scores[-1]) == (50, 200, 1.0)


matrices = st.lists(st.floats(0, 1), min_size=8, max_size=8).map(
    lambda x: np.array(x).reshape(2, 4)
)
helds = st.tuples(*[st.sets(st.integers(0, 3), min_size=1).map(lambda s: tuple(sorted(s)))] * 2)


@given(matrices, helds, st.integers(0, 9), st.integers(1, 4), st.integers(2, 8))
def test_growing_and_shrinking_against_brute_force(phat, held, count, most, total):
    limits = Limits(least=(1, 1), most=(most, most), total=total)
    inside = {(i, e) for i, ids in enumerate(held) for e in ids}
    bigger = grown(held, phat, count, limits)
    smaller = shrunk(held, phat, count, limits)
    added = {(i, e) for i, ids in enumerate(bigger) for e in ids} - inside
    removed = inside - {(i, e) for i, ids in enumerate(smaller) for e in ids}
    assert all(set(h) <= set(b) for h, b in zip(held, bigger, strict=True))
    assert all(set(s) <= set(h) for h, s in zip(held, smaller, strict=True))
    room = [max(0, most - len(ids)) for ids in held]
    assert len(added) == max(0, min(count, sum(room), total - len(inside)))
    assert len(removed) == min(count, sum(len(ids) - 1 for ids in held))
    # An expert that was passed over is no better than one taken, unless its layer is full (or at its least).
    for i, e in {(i, e) for i in range(2) for e in range(4)} - inside - added:
        if len(bigger[i]) < most:
            assert all(phat[i, e] <= phat[a] for a in added)
    for i, e in inside - removed:
        if len(smaller[i]) > 1:
            assert all(phat[i, e] >= phat[r] for r in removed)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "list found, table wanted"),
        ('{"held": [[0], [1]], "extra": 1}', "unknown key 'extra'"),
        ('{"held": [[0]]}', "1 layers found, 2 wanted"),
        ('{"held": [[0], [4]]}', r"experts \[4\] found, ascending ids below 4 wanted"),
        ('{"held": [[0], [1, 1]]}', "ascending ids"),
        ('{"held": [[0], [1]], "before": [[0], [-1]]}', "ascending ids"),
        ('{"held": [[0], [1]], "best": NaN}', "finite"),
    ],
)
def test_what_is_no_structure_is_refused(text, reason):
    with pytest.raises(StructureError, match=reason):
        from_json(text, 2, 4)


def test_json_round_trip():
    state, _ = turns(START, [0.5] * 6, LARGE, replace(RULES, mode="retry"))
    assert from_json(to_json(state), 2, 4) == state
    on_trial, _ = turns(START, [0.5] * 3, LARGE)
    assert on_trial.before is not None
    assert from_json(to_json(on_trial), 2, 4) == on_trial
    assert json.loads(to_json(on_trial))["held"] == [[0, 2, 3], [0]]

"""The state machine, without a clock or a broker."""

from hypothesis import given
from hypothesis import strategies as st

from server.rounds import (
    Closed,
    CloseRound,
    Delivered,
    Online,
    Opened,
    OpenRound,
    Plan,
    Ready,
    SendLease,
    SendOver,
    State,
    Tick,
    step,
)


def run(state, *events):
    commands = []
    for event in events:
        state, more = step(state, event)
        commands += more
    return state, commands


def opened(*devices, round=1, **plan):
    """A round that is open at time 0 with a deadline of 10 s."""
    state = State(plan=Plan(deadline=10, rounds=2, **plan), round=round, phase="opening")
    names = frozenset(devices)
    state = State(plan=state.plan, round=round, phase="opening", online=names, idle=names)
    return step(state, Opened(devices=names, now=0))[0]


def test_waits_for_the_least_number_of_devices():
    state = State(plan=Plan(min_devices=2))
    state, commands = run(state, Ready(device="b", now=0), Tick(now=100))
    assert commands == []
    state, commands = run(state, Ready(device="a", now=101), Ready(device="c", now=101))
    assert commands == [OpenRound(round=0, work="profile", devices=("a", "b"))]
    assert state.phase == "opening"


def test_ready_is_idempotent_and_gets_the_same_lease_again():
    state = opened("a", "b")
    state, commands = run(state, Ready(device="a", now=1), Ready(device="a", now=2))
    assert commands == [SendLease(device="a"), SendLease(device="a")]
    state, commands = run(
        state, Delivered(device="a", accepted=True, now=3), Ready(device="a", now=4)
    )
    assert commands == []
    assert state.idle == {"a"}


def test_closes_when_all_have_delivered_or_were_refused():
    state, commands = run(
        opened("a", "b"),
        Delivered(device="a", accepted=True, now=1),
        Delivered(device="a", accepted=True, now=1),
        Delivered(device="b", accepted=False, now=2),
    )
    assert commands == [CloseRound(round=1, work="train", by="all")]
    assert (state.accepted, state.rejected) == ({"a"}, {"b"})


def test_deadline_closes_with_enough_updates():
    state, commands = run(
        opened("a", "b"), Delivered(device="a", accepted=True, now=1), Tick(now=9.9)
    )
    assert commands == []
    state, commands = step(state, Tick(now=10))
    assert commands == [CloseRound(round=1, work="train", by="deadline")]


def test_deadline_is_extended_once_and_then_closes_with_what_is_there():
    state, commands = run(opened("a", "b"), Tick(now=10), Tick(now=19))
    assert commands == []
    assert state.extended
    state, commands = step(state, Tick(now=20))
    assert commands == [CloseRound(round=1, work="train", by="deadline")]


def test_what_comes_while_closing_does_not_count():
    state, _ = run(opened("a", "b"), Delivered(device="a", accepted=True, now=1), Tick(now=10))
    after, commands = step(state, Delivered(device="b", accepted=True, now=11))
    assert (after, commands) == (state, [])


def test_a_vanished_device_does_not_stop_the_next_round():
    state, _ = run(opened("a", "b"), Delivered(device="a", accepted=True, now=1), Tick(now=10))
    state, _ = step(state, Closed(now=11))
    # b is still online (its last will has not come): the round waits for it, but not for ever.
    state, commands = run(state, Ready(device="a", now=11.5), Tick(now=17))
    assert commands == []
    state, commands = step(state, Tick(now=18))
    assert commands == [OpenRound(round=2, work="train", devices=("a",))]


def test_opens_at_once_when_all_online_devices_are_idle():
    state, _ = run(opened("a", "b"), Delivered(device="a", accepted=True, now=1), Tick(now=10))
    state, _ = run(state, Closed(now=11), Online(device="b", online=False, now=11))
    state, commands = step(state, Ready(device="a", now=11.1))
    assert commands == [OpenRound(round=2, work="train", devices=("a",))]


def test_evaluates_at_the_end_and_says_that_it_is_over():
    state, commands = run(
        opened("a", round=3), Delivered(device="a", accepted=True, now=1), Closed(now=2)
    )
    assert commands == [CloseRound(round=3, work="evaluate", by="all"), SendOver()]
    state, commands = run(state, Ready(device="late", now=9), Tick(now=99))
    assert commands == [SendOver(device="late")]


def test_random_participation_draws_the_same_devices_for_the_same_seed():
    idle = frozenset("abcdefgh")
    plan = Plan(per_round=3, rounds=9)
    drawn = []
    for round in (1, 1, 2, 3):
        state = State(plan=plan, round=round, idle=idle, online=idle)
        (command,) = step(state, Tick(now=0))[1]
        drawn.append(command.devices)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert all(len(d) == 3 for d in drawn)


def works(plan, names):
    """Play a whole run with devices that always deliver; the work of each round."""
    everyone = frozenset(names)
    state, seen = State(plan=plan, round=plan.first, online=everyone, idle=everyone), []
    events = [Tick(now=0)]
    while events:
        state, commands = step(state, events.pop(0))
        for command in commands:
            match command:
                case OpenRound():
                    seen.append(command.work)
                    events.append(Opened(devices=frozenset(command.devices), now=0))
                    events += [Delivered(device=d, accepted=True, now=0) for d in command.devices]
                case CloseRound():
                    events += [*(Ready(device=d, now=0) for d in names), Closed(now=0)]
    assert state.phase == "over"
    return seen


def test_five_of_thirty_take_part_in_training_and_all_in_measuring():
    names = [f"d{i:02}" for i in range(30)]
    plan = Plan(rounds=60, per_round=5, min_devices=30, gather=0, seed=3)
    chosen = []
    for round in range(62):
        state = State(plan=plan, round=round, online=frozenset(names), idle=frozenset(names))
        (command,) = step(state, Tick(now=0))[1]
        if command.work != "train":
            assert len(command.devices) == 30
            continue
        assert len(set(command.devices)) == 5
        assert set(command.devices) <= set(names)
        chosen.append(command.devices)
    counts = [sum(name in devices for devices in chosen) for name in names]
    assert len(chosen) == 60
    # 10 times each on average, standard deviation 2.9: nobody is left out, nobody always drawn.
    assert min(counts) >= 2
    assert max(counts) <= 20
    assert len(set(chosen)) > 50


def test_profiling_comes_again():
    short = {"profile": "P", "train": "t", "evaluate": "E"}
    line = lambda **plan: "".join(  # noqa: E731
        short[work] for work in works(Plan(**plan), ["a", "b"])
    )
    assert line(rounds=5) == "PtttttE"
    assert line(rounds=5, reprofile=2) == "PttPttPtE"
    assert line(rounds=4, reprofile=2) == "PttPttE"  # not just before the end
    assert line(rounds=4, reprofile=9) == "PttttE"
    assert line(rounds=3, reprofile=1) == "PtPtPtE"
    assert line(rounds=0, reprofile=1) == "PE"
    assert line(rounds=3, first=1) == "tttE"


def test_without_the_first_stage_training_still_waits_for_enough_devices():
    state = State(plan=Plan(min_devices=2, first=1), round=1)
    state, commands = run(state, Ready(device="b", now=0), Tick(now=100))
    assert commands == []
    _, commands = step(state, Ready(device="a", now=101))
    assert commands == [OpenRound(round=1, work="train", devices=("a", "b"))]


def test_a_round_without_leases_closes():
    state = State(plan=Plan(), round=1, phase="opening")
    _, commands = step(state, Opened(devices=frozenset(), now=0))
    assert commands == [CloseRound(round=1, work="train", by="all")]


devices = st.sampled_from("abc")
times = st.just(0.0)
events = st.one_of(
    st.builds(Ready, device=devices, now=times),
    st.builds(Online, device=devices, online=st.booleans(), now=times),
    st.builds(Delivered, device=devices, accepted=st.booleans(), now=times),
    st.builds(Tick, now=st.floats(0, 60)),
    st.builds(Closed, now=times),
    st.builds(Opened, devices=st.frozensets(devices), now=times),
)


@given(st.lists(events, max_size=60))
def test_any_order_of_events_keeps_the_books_straight(history):
    state = State(plan=Plan(rounds=2, deadline=5))
    opens, closes = [], []
    for event in history:
        before = state
        state, commands = step(state, event)
        assert state.accepted <= state.leased
        assert not state.accepted & state.rejected
        assert state.round - before.round in (0, 1)
        opens += [c.round for c in commands if isinstance(c, OpenRound)]
        closes += [c.round for c in commands if isinstance(c, CloseRound)]
    assert opens == sorted(set(opens))  # every round opens and closes at most once
    assert closes == sorted(set(closes))
    assert set(closes) <= set(opens)

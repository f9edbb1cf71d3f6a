"""When a round opens, whom it waits for and when it closes: a pure state machine.

`step(state, event)` returns the next state and the commands that `server.run` carries out. No clock, no socket:
every event brings its time along, so each late, duplicate and lost-device case is a plain unit test.

    waiting --OpenRound--> opening --Opened--> open --CloseRound--> closing --Closed--> waiting | over
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Work = Literal["profile", "train", "evaluate"]
Phase = Literal["waiting", "opening", "open", "closing", "over"]
GATHER = (
    7.0  # seconds a new round waits for devices that are online but busy; > 5 s between two Ready
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the run shall do. Times in seconds."""

    rounds: int = 5
    min_updates: int = 1
    min_devices: int = 1
    deadline: float = 600.0
    per_round: int = 0  # 0: every idle device
    gather: float = GATHER
    seed: int = 0
    first: int = 0  # 1: without the round that profiles
    reprofile: int = 0  # training rounds between two that profile, 0: only the first does

    @property
    def last(self) -> int:
        """The round that evaluates."""
        again = (self.rounds - 1) // self.reprofile if self.reprofile and self.rounds else 0
        return self.rounds + again + 1


@dataclass(frozen=True, kw_only=True)
class State:
    """Where the run is: a round for profiling, those for training, one for evaluation; see `work_of`."""

    plan: Plan
    round: int = 0
    phase: Phase = "waiting"
    online: frozenset[str] = frozenset()
    idle: frozenset[str] = frozenset()  # said Ready and hold no open lease
    leased: frozenset[str] = frozenset()
    accepted: frozenset[str] = frozenset()
    rejected: frozenset[str] = frozenset()
    since: float = 0.0  # when the waiting began
    deadline: float = 0.0
    extended: bool = False

    @property
    def pending(self) -> frozenset[str]:
        """Devices of the open round that have not delivered yet."""
        return self.leased - self.accepted - self.rejected


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A device is idle."""

    device: str
    now: float


@dataclass(frozen=True, kw_only=True)
class Online:
    """A device came or went."""

    device: str
    online: bool
    now: float


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """An update of the open round is durable (`accepted`) or was refused for good."""

    device: str
    accepted: bool
    now: float


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time passes."""

    now: float


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The leases of the round are on disk."""

    devices: frozenset[str]
    now: float


@dataclass(frozen=True, kw_only=True)
class Closed:
    """The round's result is on disk."""

    now: float


Event = Ready | Online | Delivered | Tick | Opened | Closed


@dataclass(frozen=True, kw_only=True)
class OpenRound:
    """Choose experts, write leases; answer with `Opened`."""

    round: int
    work: Work
    devices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SendLease:
    """(Re)send a device its open lease; harmless when it has it already."""

    device: str


@dataclass(frozen=True, kw_only=True)
class CloseRound:
    """Aggregate what was accepted; answer with `Closed`."""

    round: int
    work: Work
    by: Literal["all", "deadline"]


@dataclass(frozen=True, kw_only=True)
class SendOver:
    """Tell a device, or everyone (None), that the run is over."""

    device: str | None = None


Command = OpenRound | SendLease | CloseRound | SendOver


def work_of(round: int, plan: Plan) -> Work:
    """What a round is for.

    Every `plan.reprofile` training rounds all devices profile again, also those that were not drawn for long. In
    between, the statistics that come with the training updates of a round serve the choice of the next: stale by one
    round, but free (arXiv 2508.19078).

    >>> [work_of(r, Plan(rounds=2)) for r in range(4)]
    ['profile', 'train', 'train', 'evaluate']
    >>> [work_of(r, Plan(rounds=3, reprofile=2)) for r in range(6)]
    ['profile', 'train', 'train', 'profile', 'train', 'evaluate']
    """
    if round >= plan.last:
        return "evaluate"
    every = plan.reprofile + 1 if plan.reprofile else plan.last
    return "train" if round % every else "profile"


def step(state: State, event: Event) -> tuple[State, list[Command]]:
    """Take one event.

    Returns
    -------
    (State, list of Command)
        Commands in the order in which they are to be carried out.
    """
    match event:
        case Ready(device=device):
            state, commands = _ready(state, device)
        case Online(device=device, online=True):
            state, commands = replace(state, online=state.online | {device}), []
        case Online(device=device):
            gone = {device}
            state = replace(state, online=state.online - gone, idle=state.idle - gone)
            commands = []
        case Delivered(device=device, accepted=accepted):
            state, commands = _delivered(state, device, accepted), []
        case Opened(devices=devices) if state.phase == "opening":
            state = replace(
                state,
                phase="open",
                leased=devices,
                idle=state.idle - devices,
                deadline=event.now + state.plan.deadline,
                extended=False,
            )
            commands = [SendLease(device=d) for d in sorted(devices)]
        case Closed() if state.phase == "closing":
            state, commands = _closed(state, event.now)
        case _:
            commands = []
    state, more = _advance(state, event.now)
    return state, [*commands, *more]


def _ready(state: State, device: str) -> tuple[State, list[Command]]:
    if state.phase == "over":
        return state, [SendOver(device=device)]
    state = replace(state, online=state.online | {device})
    if state.phase == "open" and device in state.pending:
        return state, [SendLease(device=device)]
    return replace(state, idle=state.idle | {device}), []


def _delivered(state: State, device: str, accepted: bool) -> State:
    if state.phase != "open" or device not in state.pending:
        return state  # a duplicate, or too late for this round
    if accepted:
        return replace(state, accepted=state.accepted | {device})
    return replace(state, rejected=state.rejected | {device})


def _closed(state: State, now: float) -> tuple[State, list[Command]]:
    nobody: frozenset[str] = frozenset()
    state = replace(
        state,
        round=state.round + 1,
        phase="waiting",
        leased=nobody,
        accepted=nobody,
        rejected=nobody,
        since=now,
    )
    if state.round > state.plan.last:
        return replace(state, phase="over"), [SendOver()]
    return state, []


def _advance(state: State, now: float) -> tuple[State, list[Command]]:
    """Open or close a round when its time has come."""
    plan, work = state.plan, work_of(state.round, state.plan)
    if state.phase == "waiting" and _may_open(state, now):
        devices = _participants(state, work)
        opened = OpenRound(round=state.round, work=work, devices=devices)
        return replace(state, phase="opening"), [opened]
    if state.phase == "open":
        if not state.pending:
            closing = CloseRound(round=state.round, work=work, by="all")
            return replace(state, phase="closing"), [closing]
        if now >= state.deadline:
            if len(state.accepted) < plan.min_updates and not state.extended:
                return replace(state, deadline=now + plan.deadline, extended=True), []
            closing = CloseRound(round=state.round, work=work, by="deadline")
            return replace(state, phase="closing"), [closing]
    return state, []


def _may_open(state: State, now: float) -> bool:
    if state.round == state.plan.first:
        return len(state.idle) >= max(1, state.plan.min_devices)
    if len(state.idle) < max(1, state.plan.min_updates):
        return False
    return state.online <= state.idle or now - state.since >= state.plan.gather


def _participants(state: State, work: Work) -> tuple[str, ...]:
    idle = sorted(state.idle)
    wanted = state.plan.per_round
    if work != "train" or not 0 < wanted < len(idle):
        return tuple(idle)
    rng = np.random.default_rng([state.plan.seed, state.round])
    return tuple(sorted(idle[i] for i in rng.choice(len(idle), wanted, replace=False)))

"""What a device keeps: the shape that is worth most within its budgets, and the experts that fill it (pure).

Every expert of every layer is absent or in a state: a format, and a rank of 0, R / 2 or R. `items` says what these
are worth and cost, `knapsack` chooses under four caps: peak memory, flash, seconds and uplink bytes of a round. The
floor: in every layer the kept experts carry a share theta of the routing (FedMoE, arXiv 2408.11304), but theta gives
way before nothing fits; at least top-k experts of a layer are kept and one of them is trained. Dense matrices are
int8 where the floor holds with that, else int4. The batch shrinks (see `catalogue`) where that saves the floor; batch
and then sequence, before giving up.

Caps that do not bind play no part: a plan is made for memory alone first. So it depends on nothing but the base, the
values and the rounded room, and devices with nearly the same budgets get the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from device_profiles import DeviceProfile
from export import catalogue, costs, items, knapsack, work
from export.costs import Dense
from export.items import CAPS, Bools, Floats, Ints, Rates, Values
from protocol.manifest import BaseIndex, MemoryPlan, Shape

MB = 2**20


class DoesNotFit(ValueError):
    """Not even the smallest sub-MoE fits the budgets."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a build may overrule of a profile; None leaves it."""

    rank: int | None = None
    sequence: int | None = None
    batch: int | None = None
    answers: int = 4
    theta: float = 0.6
    steps: int = 20  # of a round
    deadline: float | None = None  # seconds of a round
    uplink_mb: float | None = None  # of a round
    scale_budget: float = 1.0

    @property
    def fixed(self) -> frozenset[str]:
        """Sizes that the planner may not change."""
        return frozenset(n for n in ("batch", "sequence") if getattr(self, n) is not None)


@dataclass(frozen=True)
class Budget:
    """What a device allows."""

    limits: Floats  # [C], as CAPS
    rates: Rates

    @property
    def memory(self) -> int:
        """Bytes of peak memory."""
        return int(self.limits[0])


@dataclass(frozen=True)
class Plan:
    """A choice, and where every byte and second of it goes."""

    shape: Shape
    experts: tuple[tuple[int, ...], ...]  # per layer, in slot order
    theta: float  # the floor that was kept
    bound: float  # the plan's worth, as a share of what no plan can exceed
    memory: MemoryPlan
    flash: dict[str, int]
    uplink: int
    seconds: dict[str, float]
    budget: Budget

    @property
    def used(self) -> Floats:
        """[C]."""
        spent = (sum(self.flash.values()), sum(self.seconds.values()), self.uplink)
        return np.array([self.memory.predicted, *spent], np.float64)


def budget_of(profile: DeviceProfile, choices: Choices) -> Budget:
    """The profile's budgets, overruled by this build's choices."""
    uplink = profile.uplink_mb if choices.uplink_mb is None else choices.uplink_mb
    seconds = profile.deadline_s if choices.deadline is None else choices.deadline
    memory = int(profile.budget_bytes * choices.scale_budget)
    rates = Rates(
        choices.steps, profile.gflops * 1e9 * work.EFFICIENCY, profile.uplink_mbit * 1e6 / 8
    )
    return Budget(np.array([memory, profile.flash_budget_mb * MB, seconds, uplink * MB]), rates)


@dataclass(frozen=True)
class _Question:
    """What is the same for all sizes."""

    base: BaseIndex
    dense: Dense
    values: Values
    budget: Budget
    rank: int
    reserve: int


@dataclass(frozen=True)
class _Size:
    """A batch, a sequence and a dense format with which the floor `theta` fits."""

    empty: Shape
    theta: float
    fixed: Floats  # [C], without any expert
    room: Floats  # [C], rounded
    floor: Bools  # [L, E]


def choose(
    base: BaseIndex,
    dense: Dense,
    profile: DeviceProfile,
    choices: Choices,
    values: Values | None = None,
    reserve: int = 0,
) -> Plan:
    """The most valuable sub-MoE within the budgets of `profile`.

    Parameters
    ----------
    base : BaseIndex
        Only its sizes are used: an `outline.of(config)` will do.
    values : Values or None
        None chooses by the base's routing prior.
    reserve : int
        Bytes of memory that lowering has shown to be needed beyond the estimate.

    Raises
    ------
    DoesNotFit
    """
    values = items.prior(base) if values is None else values
    question = _Question(
        base, dense, values, budget_of(profile, choices), choices.rank or profile.rank, reserve
    )
    best: _Size | None = None
    for empty in _sizes(base, profile, choices):
        if best is not None and empty.sequence < best.empty.sequence:
            break
        try:
            size = _with_floor(question, empty, choices.theta)
        except DoesNotFit as error:
            refused = error
            continue
        same = best is not None and best.empty.batch == empty.batch
        if best is None or size.theta >= choices.theta or (same and size.theta > best.theta):
            best = size
        if best.theta >= choices.theta:
            break
    if best is None:
        raise DoesNotFit(f"{profile.name}: {refused} ({_advice(str(refused), choices)})")
    return _solve(question, best)


def _advice(refusal: str, choices: Choices) -> str:
    """Flags that would help; sizes that were not given have been made as small as they may be."""
    given = ", ".join(f"--{n}" for n in ("batch", "sequence") if n in choices.fixed)
    smaller = f"try a smaller {given + ', ' if given else ''}--rank"
    if "tokens: flash" in refusal:
        return "the base is too large for this device"
    if "tokens: time" in refusal:
        return f"{smaller}, fewer --steps or a longer --deadline"
    return f"{smaller} or a larger --uplink-mb" if "tokens: uplink" in refusal else smaller


def _sizes(base: BaseIndex, profile: DeviceProfile, choices: Choices) -> Iterator[Shape]:
    """Shapes without slots, in the order in which they are tried."""
    asked = choices.batch or profile.batch, choices.sequence or profile.sequence
    for batch, sequence in catalogue.sizes(*asked, fixed=choices.fixed):
        if sequence <= choices.answers and sequence != asked[1]:
            continue
        for format in sorted(base.dense, key=lambda f: -items.WIDTH[f]):
            yield Shape(
                batch=batch, sequence=sequence, answers=choices.answers, dense=format, slots=()
            )


def _with_floor(question: _Question, empty: Shape, wanted: float) -> _Size:
    """The highest theta of the catalogue, up to the wanted one, that fits beside the fixed costs."""
    base, budget = question.base, question.budget
    fixed = _fixed(question, empty)
    room = budget.limits - fixed
    if (room < 0).any():
        raise DoesNotFit(_refusal(question, empty, fixed))
    rounded = np.array([catalogue.round_down(r) for r in room])
    slots = items.states(base, question.rank)
    for theta in catalogue.thetas(wanted):
        floor = items.kept(question.values, theta, base.top_k)
        cost = items.cost(base, question.values, floor, empty, slots, budget.rates)
        may = items.allowed(question.values, floor, slots)
        least = np.where(may[..., None], cost, np.inf).min(1).sum(0)
        if (least <= rounded).all():
            return _Size(empty, theta, fixed, rounded, floor)
    # The smallest shape is the same for everyone: there nothing has to be rounded.
    if (least <= room).all():
        return _Size(empty, 0.0, fixed, room, floor)
    raise DoesNotFit(_refusal(question, empty, fixed + least))


def _fixed(question: _Question, empty: Shape) -> Floats:
    """[C]: costs without any expert."""
    base, budget = question.base, question.budget
    memory = costs.estimate(base, question.dense, empty, budget.memory).predicted
    step = work.fixed_work(base, question.dense, empty)
    return np.array(
        [
            memory + question.reserve,
            sum(costs.flash(base, empty).values()),
            budget.rates.steps * step.total / budget.rates.operations,
            0.0,
        ]
    )


def _refusal(question: _Question, empty: Shape, used: Floats) -> str:
    limits = question.budget.limits
    cap = int(np.argmax(used / np.maximum(limits, 1e-9)))
    unit, name = (1.0, "s") if CAPS[cap] == "time" else (float(MB), "MB")
    return (
        f"{question.base.top_k} experts in each of {len(question.base.moe_layers)} layers do not fit at "
        f"{empty.batch} x {empty.sequence} tokens: {CAPS[cap]}: about {used[cap] / unit:.1f} {name} "
        f"needed, the budget is {limits[cap] / unit:.1f} {name}"
    )


def _solve(question: _Question, size: _Size) -> Plan:
    """Plan for memory alone, then with every other cap that this would exceed."""
    base, values, budget = question.base, question.values, question.budget
    slots = items.states(base, question.rank)
    cost = items.cost(base, values, size.floor, size.empty, slots, budget.rates)
    may = items.allowed(values, size.floor, slots)
    worth = items.worth(base, values, slots)
    # Of equal experts every layer gets as many.
    order = (values.places * len(size.floor) + np.arange(len(size.floor))[:, None]).ravel()
    cheapest = np.argmin(np.where(may, cost[..., 0], np.inf), axis=1)
    active, room = [0], size.room.copy()
    while True:
        try:
            choice = knapsack.solve(worth, cost[..., active], room[active], may, order)
        except knapsack.Infeasible:
            choice = knapsack.Choice(cheapest, 1.0, 1.0)
        used = cost[np.arange(len(cost)), choice.states].sum(0)
        over = [c for c in range(len(CAPS)) if c not in active and used[c] > room[c]]
        if over:
            active += over
            continue
        plan = _plan(question, size, choice)
        # Scratch grows with the largest layer, which single experts do not know. Against the rounded room, so that
        # the answer is the same for all devices that share it.
        excess = plan.memory.predicted - (size.fixed[0] + size.room[0])
        if excess <= 0:
            return plan
        if (choice.states == cheapest).all():
            if plan.memory.predicted > budget.memory:
                raise DoesNotFit(_refusal(question, size.empty, plan.used))
            return plan
        room[0] -= excess


def _plan(question: _Question, size: _Size, choice: knapsack.Choice) -> Plan:
    base, budget = question.base, question.budget
    table = choice.states.reshape(size.floor.shape)
    shape = replace(size.empty, slots=_slots(question, table))
    places = question.values.places
    experts = tuple(
        tuple(sorted(np.flatnonzero(row).tolist(), key=lambda e, order=order: int(order[e])))
        for row, order in zip(table, places, strict=True)
    )
    memory = costs.estimate(base, question.dense, shape, budget.memory)
    uplink = sum(costs.slot_uplink(base, slot) for layer in shape.slots for slot in layer)
    return Plan(
        shape=shape,
        experts=experts,
        theta=size.theta,
        bound=choice.value / choice.bound if choice.bound else 1.0,
        memory=replace(memory, arena=memory.arena + question.reserve),
        flash=costs.flash(base, shape),
        uplink=uplink,
        seconds=_seconds(question, shape, experts, uplink),
        budget=budget,
    )


def _slots(question: _Question, table: Ints) -> tuple[tuple[costs.Slot, ...], ...]:
    """Per layer: higher rank first, then the wider format."""
    states = items.states(question.base, question.rank)
    return tuple(
        tuple(
            sorted(
                (states[s - 1] for s in row.tolist() if s),
                key=lambda slot: (-slot.rank, -items.WIDTH[slot.format]),
            )
        )
        for row in table
    )


def _seconds(
    question: _Question, shape: Shape, experts: tuple[tuple[int, ...], ...], uplink: int
) -> dict[str, float]:
    """Seconds of a round by where they go."""
    base, values, rates = question.base, question.values, question.budget.rates
    resident = np.zeros(values.mass.shape, bool)
    for layer, ids in enumerate(experts):
        resident[layer, list(ids)] = True
    tokens = items.load(base, shape, values.mass, resident)
    step = work.fixed_work(base, question.dense, shape)
    unpacking, adapters = step.unpacking, 0.0
    for layer, slots in enumerate(shape.slots):
        for slot, expert in zip(slots, experts[layer], strict=True):
            unpacking += work.unpacking(base, slot)
            adapters += work.adapter_work(base, slot) * float(tokens[layer, expert])
    done = replace(step, unpacking=unpacking, adapters=adapters)
    spent = {name: rates.steps * n / rates.operations for name, n in vars(done).items()}
    return {**spent, "upload": uplink / rates.uplink}

"""The experts of a base as items of a knapsack: which states each may be in, what these are worth and cost (pure).

Letters: L MoE layers, E experts, J states of a present expert, C caps. Arrays of items are [L * E, 1 + J], the first
column is absent.

A state is worth v * (1 - error of its format) + gamma * u * sqrt(rank / largest rank): v is the expert's share of its
layer's routing, u its share of what training brings (Flux's expert utility), v where nobody measured that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export import costs, work
from protocol.manifest import BaseIndex, Shape, Slot

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
CAPS = ("memory", "flash", "time", "uplink")
GAMMA = 1.0  # training an expert counts as much as having it
WIDTH = {"int8": 2, "nf4": 1, "int4": 0, "none": 0}


@dataclass(frozen=True)
class Values:
    """What is known of the experts: `mass` and `use` [L, E], rows sum to 1. `selected` alone may be kept, if given."""

    mass: Floats
    use: Floats
    selected: Bools | None = None  # [L, E]

    @property
    def places(self) -> Ints:
        """[L, E]: each expert's place in its layer, the most valuable first."""
        worth = self.mass + GAMMA * self.use
        if self.selected is not None:
            worth = worth + 4.0 * self.selected
        return np.argsort(np.argsort(-worth, axis=1, kind="stable"), axis=1)


@dataclass(frozen=True)
class Rates:
    """What turns work into seconds of a round."""

    steps: int
    operations: float  # per second
    uplink: float  # bytes per second


def prior(base: BaseIndex) -> Values:
    """The base's own routing; uniform where it brings none."""
    mass = np.asarray(base.routing_prior, dtype=np.float64)
    return Values(mass, mass)


def states(base: BaseIndex, rank: int) -> tuple[Slot, ...]:
    """Every way to keep an expert; the first is the cheapest. Adapter experts are always trained."""
    if base.projections == ("adapter",):
        return tuple(Slot(format="none", rank=r) for r in sorted({max(1, rank // 2), rank}))
    formats = sorted(base.experts, key=lambda f: (WIDTH[f], base.error[f]))
    return tuple(Slot(format=f, rank=r) for f in formats for r in sorted({0, rank // 2, rank}))


def kept(values: Values, theta: float, least: int) -> Bools:
    """[L, E]: the floor. The fewest of the most valuable experts that carry `theta` of the routing, at least `least`.

    >>> row = np.array([[0.1, 0.6, 0.2, 0.1]])
    >>> kept(Values(row, row), 0.7, 1).tolist()
    [[False, True, True, False]]
    """
    if values.selected is not None:
        return values.selected
    places = values.places
    ordered = np.take_along_axis(values.mass, np.argsort(places, axis=1), axis=1)
    need = (np.cumsum(ordered, axis=1) < theta - 1e-9).sum(1) + 1
    return places < np.clip(need, least, values.mass.shape[1])[:, None]


def allowed(values: Values, floor: Bools, slots: Sequence[Slot]) -> Bools:
    """[L * E, 1 + J]: experts of the floor are present, the best of each layer is trained."""
    trained = np.array([False, *(slot.rank > 0 for slot in slots)])
    may = np.ones((*floor.shape, len(trained)), bool)
    may[floor, 0] = False
    if values.selected is not None:
        may[~values.selected, 1:] = False
    best = np.argmin(values.places, axis=1)
    may[np.arange(len(floor)), best] &= trained
    return may.reshape(-1, len(trained))


def worth(base: BaseIndex, values: Values, slots: Sequence[Slot]) -> Floats:
    """[L * E, 1 + J]."""
    mass, use = values.mass.ravel(), values.use.ravel()
    top = max(slot.rank for slot in slots)
    columns = [np.zeros_like(mass)]
    for slot in slots:
        error = base.error.get(slot.format, 0.0)
        columns.append(mass * (1 - error) + GAMMA * use * math.sqrt(slot.rank / top))
    return np.stack(columns, 1)


def load(base: BaseIndex, shape: Shape, mass: Floats, resident: Bools) -> Floats:
    """[L, E]: tokens that each resident expert sees in a step; a token passes an expert at most once."""
    tokens = shape.batch * shape.sequence
    share = mass / np.maximum((mass * resident).sum(1, keepdims=True), 1e-9)
    return np.minimum(base.top_k * tokens * share, tokens)


def cost(
    base: BaseIndex, values: Values, floor: Bools, shape: Shape, slots: Sequence[Slot], rates: Rates
) -> Floats:
    """[L * E, 1 + J, C]. Tokens count as if only the floor were resident, which is never too few."""
    tokens = load(base, shape, values.mass, floor)
    table = np.zeros((*floor.shape, 1 + len(slots), len(CAPS)))
    for place, slot in enumerate(slots, 1):
        uplink = costs.slot_uplink(base, slot)
        operations = work.unpacking(base, slot) + work.adapter_work(base, slot) * tokens
        table[..., place, 0] = costs.slot_memory(base, slot)
        table[..., place, 1] = costs.slot_flash(base, slot)
        table[..., place, 2] = rates.steps * operations / rates.operations + uplink / rates.uplink
        table[..., place, 3] = uplink
    return table.reshape(-1, 1 + len(slots), len(CAPS))

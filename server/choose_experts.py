"""Which expert goes into which slot of which device, given everyone's values. Pure.

Letters: L MoE layers, E experts per layer, P slots of a layer, T <= P trained ones, C <= T of them for coverage.

The slots of a layer are ordered by worth: rank first, then width of the format. The most valuable experts fill them in
that order, but for C trained slots: these go to the experts that the fewest devices train, because greedy selection per
device starves experts globally (arXiv 2512.23070). A frozen slot trains nothing and so never counts as coverage. With
`past`, what experts were given in the rounds before counts as holders do: few devices a round then cover them in turn.

Another expert, or the same in another format, is a blob to download. So the choice starts from what the device holds,
and an expert gives way only to one whose value is higher by more than a margin, or where coverage needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.manifest import Slot

Floats = NDArray[np.float64]
Chosen = list[list[int]]  # [L][P] global expert ids in slot order
MARGIN = 0.05  # of a uniform share 1 / E; about half of what exploration adds to an expert nobody trained


def settled(order: Sequence[int], worth: Floats, margin: float) -> list[int]:
    """Sort by falling worth, but leave in place what differs by no more than `margin`.

    Parameters
    ----------
    order : experts as they were
    worth : [E]

    Returns
    -------
    The same experts. None stands before one that is worth more than `margin` more; without any such pair in `order`,
    `order` itself.

    Examples
    --------
    >>> settled([0, 1, 2], np.array([0.30, 0.33, 0.90]), 0.05)
    [2, 0, 1]
    """
    done: list[int] = []
    for expert in order:
        bar = worth[expert] - margin
        place = next((i for i, other in enumerate(done) if worth[other] < bar), len(done))
        done.insert(place, expert)
    return done


@dataclass(frozen=True)
class _Room:
    """Slots of one layer of one device: in all, trained, and trained for coverage."""

    slots: int
    trained: int
    shared: int

    @property
    def own(self) -> int:
        """Trained slots filled by value."""
        return self.trained - self.shared


def _room(slots: Sequence[Slot], experts: int, top_k: int, coverage: float) -> _Room:
    room = min(len(slots), experts)
    trained = sum(1 for slot in slots[:room] if slot.rank)
    shared = min(int(trained * coverage), max(0, room - top_k))
    return _Room(room, trained, shared)


def choose(
    value: Mapping[str, Floats],
    slots: Mapping[str, Sequence[Sequence[Slot]]],
    *,
    top_k: int,
    coverage: float,
    seed: int,
    former: Mapping[str, Chosen] | None = None,
    past: Floats | None = None,
) -> dict[str, Chosen]:
    """Fill the slots of all devices together.

    Parameters
    ----------
    value : device -> [L, E]
    slots : device -> per layer, its slots in order
    coverage : float in [0, 1]
        At most this share of a layer's trained slots goes to the experts trained by the fewest devices; `top_k` slots
        or more are filled by value.
    seed : int
        Breaks ties only.
    former : device -> what it held last, in slot order
    past : [L, E], optional
        Training of each expert in former rounds, in holders: `coverage.faded`.

    Returns
    -------
    device -> per layer, global expert ids in slot order; min(P, E) of them

    Examples
    --------
    >>> v, two = np.array([[0.4, 0.3, 0.2, 0.1]]), [[Slot(format="int4", rank=4)] * 2]
    >>> choose({"a": v, "b": v}, {"a": two, "b": two}, top_k=1, coverage=0.5, seed=0)
    {'a': [[0, 1]], 'b': [[0, 2]]}
    """
    devices = sorted(value)
    if not devices:
        return {}
    layers, experts = value[devices[0]].shape
    jitter = np.random.default_rng(seed).uniform(0, 1e-9, (layers, experts))
    chosen: dict[str, Chosen] = {device: [] for device in devices}
    for layer in range(layers):
        rooms = {d: _room(slots[d][layer], experts, top_k, coverage) for d in devices}
        worth = {d: value[d][layer] + jitter[layer] for d in devices}
        held = {d: former[d][layer] if former and d in former else [] for d in devices}
        before = np.zeros(experts) if past is None else past[layer].astype(np.float64)
        for device, ids in _layer(devices, rooms, worth, held, before).items():
            chosen[device].append(ids)
    return chosen


def _layer(
    devices: Sequence[str],
    rooms: Mapping[str, _Room],
    worth: Mapping[str, Floats],
    former: Mapping[str, Sequence[int]],
    past: Floats,
) -> dict[str, list[int]]:
    experts, holders = len(past), past.copy()
    margin = MARGIN / experts
    ranked, own, shared = {}, {}, {}
    for d in devices:
        room, held = rooms[d], former[d]
        # What it held for its value keeps its place; what it held for coverage is as good as its value.
        start = [*held[: room.own], *held[room.trained : room.slots]]
        rest = sorted(set(range(experts)) - set(start), key=lambda e: -worth[d][e])
        ranked[d] = settled([*start, *rest], worth[d], margin)
        own[d] = ranked[d][: room.own]
        shared[d] = [e for e in held[: room.trained] if e not in own[d]][: room.shared]
        holders[own[d] + shared[d]] += 1
    _fill(devices, rooms, worth, own, shared, holders)
    _balance(devices, worth, own, shared, holders)
    filled = {}
    for d in devices:
        kept = [e for e in former[d] if e in shared[d]]
        new = sorted(set(shared[d]) - set(kept), key=lambda e: -worth[d][e])
        trained = [*own[d], *settled([*kept, *new], worth[d], margin)]
        frozen = [e for e in ranked[d] if e not in trained]
        filled[d] = [*trained, *frozen[: rooms[d].slots - rooms[d].trained]]
    return filled


def _fill(
    devices: Sequence[str],
    rooms: Mapping[str, _Room],
    worth: Mapping[str, Floats],
    own: Mapping[str, list[int]],
    shared: Mapping[str, list[int]],
    holders: Floats,
) -> None:
    """Give the free coverage slots to the experts with the fewest holders; in place."""
    free = [d for d in devices if len(shared[d]) < rooms[d].shared]
    # One slot per device and turn, so that no device takes all rare experts.
    while free:
        for d in free:
            key = holders.copy()
            key[own[d] + shared[d]] = np.inf
            rarest = np.flatnonzero(key == key.min())
            expert = int(rarest[np.argmax(worth[d][rarest])])
            shared[d].append(expert)
            holders[expert] += 1
        free = [d for d in free if len(shared[d]) < rooms[d].shared]


def _balance(
    devices: Sequence[str],
    worth: Mapping[str, Floats],
    own: Mapping[str, list[int]],
    shared: Mapping[str, list[int]],
    holders: Floats,
) -> None:
    """Replace common experts in coverage slots by rare ones until no replacement makes the counts more even; in place.

    It ends: the expert that loses a holder has at least two more than the other, so the sum of their squares falls.
    """
    moved = True
    while moved:
        moved = False
        moves = {d: _best_move(worth[d], own[d], shared[d], holders) for d in devices}
        # The largest unevenness first; of equal ones where it costs a device the least value.
        for d in sorted(devices, key=lambda d: moves[d][0], reverse=True):
            # What others have done in this pass may have settled it.
            (gain, _), common, rare = _best_move(worth[d], own[d], shared[d], holders)
            if gain >= 2:
                shared[d][shared[d].index(common)] = rare
                holders[common] -= 1
                holders[rare] += 1
                moved = True


def _best_move(
    worth: Floats, own: Sequence[int], shared: Sequence[int], holders: Floats
) -> tuple[tuple[float, float], int, int]:
    """One device's expert with the most holders, and the one with the fewest that it lacks.

    Returns
    -------
    (difference of holders, gain in worth), the first expert, the second; a difference of 0 where there is no move
    """
    others = np.setdiff1d(np.arange(len(holders)), [*own, *shared])
    if not shared or not len(others):
        return (0.0, 0.0), -1, -1
    there = np.array(shared)
    common = int(there[np.lexsort((worth[there], -holders[there]))[0]])
    rare = int(others[np.lexsort((-worth[others], holders[others]))[0]])
    return (
        (float(holders[common] - holders[rare]), float(worth[rare] - worth[common])),
        common,
        rare,
    )

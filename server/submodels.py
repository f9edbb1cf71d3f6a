"""The sub-models of all devices of a run: begun from the chosen experts, changed by `structure`, laid into slots. Pure.

FedMoE (arXiv 2408.11304) lets a sub-model take more or less memory. Here memory is settled when a program is exported,
and a program wants all its slots filled. So growing and shrinking act within the slots: the sub-model of a device is
what it trains and sends, at most one expert per trainable slot. Trainable slots that the sub-model leaves free, and
frozen slots, hold company: experts of high value that answer but learn nothing. A smaller sub-model costs less time and
uplink; peak memory stays. While structures are in use, an expert enters or leaves a sub-model by a change of structure
only, never because its value moved.

Letters: L MoE layers, E experts per layer, P slots of a layer. A layer is meant by its position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from protocol.manifest import Shape, Slot
from protocol.update import Facts
from server import structure
from server.choose_experts import Chosen
from server.similarity import Floats
from server.structure import Change, Held, Limits, Report, Rules, State


def limits(shape: Shape, top_k: int, experts: int) -> Limits:
    """Room of a device: as many experts as slots that train, at least `top_k` of a layer where it has so many.

    >>> small = (Slot(format="int4", rank=4), Slot(format="int4", rank=4), Slot(format="int4", rank=0))
    >>> limits(Shape(batch=1, sequence=8, answers=1, dense="int4", slots=(small,)), 1, 8)
    Limits(least=(1,), most=(2,), total=2)
    """
    most = tuple(sum(1 for slot in slots[:experts] if slot.rank) for slots in shape.slots)
    return Limits(least=tuple(min(top_k, n) for n in most), most=most, total=sum(most))


def begin(chosen: Chosen, shape: Shape, room: Limits, head_room: float) -> State:
    """First sub-model of a device: of the experts chosen for slots that train, the first ones.

    Parameters
    ----------
    chosen : per layer, experts in slot order
    head_room : share of these slots to use, the paper's alpha; the others are left for growth
    """
    held = []
    for ids, slots, least in zip(chosen, shape.slots, room.least, strict=True):
        able = [e for e, slot in zip(ids, slots, strict=False) if slot.rank]
        held.append(tuple(sorted(able[: max(least, int(head_room * len(able)))])))
    return State(held=tuple(held))


def fits(held: Held, room: Limits) -> bool:
    """Whether a sub-model of former days still has its place: a device may come back with another program."""
    pairs = zip(held, room.least, room.most, strict=True)
    return all(least <= len(ids) <= most for ids, least, most in pairs)


def place(
    held: Sequence[int], chosen: Sequence[int], slots: Sequence[Slot], former: Sequence[int]
) -> list[int]:
    """Lay one layer's sub-model and its company into slots, moving as little as possible.

    Parameters
    ----------
    held : experts to train; no more than slots that train
    chosen : experts by slot, as chosen without a structure; those not held are the company, the first ones first
    former : what the slots hold now

    Returns
    -------
    As many experts as chosen, in slot order; each of `held` in a slot that trains

    Examples
    --------
    >>> train, frozen = Slot(format="int4", rank=4), Slot(format="int4", rank=0)
    >>> place((1, 5), (7, 5, 3), (train, train, frozen), (7, 1, 5))
    [5, 1, 7]
    """
    room = len(chosen)
    placed: list[int | None] = [None] * room
    able = [i for i in range(room) if slots[i].rank]
    company = [e for e in chosen if e not in held][: room - len(held)]
    # The most valuable come first in `chosen`, and the best slots first in a layer.
    trains = sorted(held, key=lambda e: list(chosen).index(e) if e in chosen else room)
    for wanted, places in ((trains, able), (company, range(room))):
        for i in places:
            if i < len(former) and former[i] in wanted and placed[i] is None:
                placed[i] = former[i]
        missing = [e for e in wanted if e not in placed]
        free = [i for i in places if placed[i] is None]
        for i, expert in zip(free, missing, strict=False):
            placed[i] = expert
    laid = [e for e in placed if e is not None]
    assert len(laid) == room
    assert not set(held) - set(laid)
    return laid


def pin(
    chosen: Mapping[str, Chosen],
    shapes: Mapping[str, Shape],
    states: Mapping[str, State],
    former: Mapping[str, Chosen],
) -> dict[str, Chosen]:
    """What each device holds: its sub-model and company where it has a state, else what was chosen."""
    pinned: dict[str, Chosen] = {}
    for device, layers in chosen.items():
        state = states.get(device)
        if state is None:
            pinned[device] = layers
            continue
        pinned[device] = [
            place(held, ids, shapes[device].slots[i], former[device][i] if device in former else ())
            for i, (held, ids) in enumerate(zip(state.held, layers, strict=True))
        ]
    return pinned


def score(facts: Facts) -> float | None:
    """How well a device does after its turn, higher is better: accuracy on its held-back rows, or less their loss.

    None when it held no rows back, so that nothing was measured.
    """
    if facts.held_back_rows <= 0:
        return None
    return facts.accuracy_after if facts.accuracy_after >= 0 else -facts.loss_after


def after(
    scores: Mapping[str, float],
    states: Mapping[str, State],
    activations: Mapping[str, Floats],
    room: Mapping[str, Limits],
    rules: Rules,
) -> tuple[dict[str, State], dict[str, Change]]:
    """Take the scores of a round; the order of devices does not matter.

    Parameters
    ----------
    scores : device -> score of its turn, of the devices that trained
    states : of all devices that have a sub-model
    activations : device -> [L, E], the newest that there is
    room : device -> limits

    Returns
    -------
    (device -> State, device -> Change), of the devices in `scores` that have a state, an activation and limits
    """
    peers = {
        device: structure.Peer(activation=activations[device], experts=state.experts)
        for device, state in states.items()
        if device in activations
    }
    new: dict[str, State] = {}
    changes: dict[str, Change] = {}
    for device in sorted(set(scores) & set(peers) & set(room)):
        others = {name: peer for name, peer in peers.items() if name != device}
        report = Report(score=scores[device], activation=activations[device])
        new[device], changes[device] = structure.step(
            states[device], report, others, room[device], rules
        )
    return new, changes

"""How the sub-model of one device changes while it trains (FedMoE, arXiv 2408.11304, algorithm 1). Pure.

`step(state, report, peers, limits, rules)` takes the device's score on its held-back rows after each of its turns.
When it has not risen for `patience` turns, the sub-model moves towards the size of the similar devices' sub-models:
grow by the experts that those use most, or shrink by the ones they use least. A change is on trial for some turns;
without a new best score it is undone.

    training --plateau--> trial --new best--> training
                            \\--none-----> undone: frozen for good ("freeze", as printed)
                                                   or the same moves rest for a while ("retry")

Letters: L MoE layers, E experts per layer. A layer is meant by its position.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from protocol import schema
from server import similarity
from server.similarity import Floats

Held = tuple[tuple[int, ...], ...]  # [L], ascending global expert ids
Moves = tuple[tuple[int, int], ...]  # (layer, expert)
Mode = Literal["freeze", "retry"]
HISTORY = 50  # scores that are kept


class StructureError(ValueError):
    """A stored structure that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """When to change. The paper names none of these numbers.

    Attributes
    ----------
    mode : after a failed change: "freeze" for good (as printed) or "retry" (ours), where other moves may be tried
    patience : turns without a new best score before a change
    trial : turns that a change has to bring a new best score
    similar : devices that are asked (K of eq. 5)
    rest : turns that the moves of a failed change are not tried again ("retry")
    least_gain : a best score counts as new when it is higher by more than this
    """

    mode: Mode = "freeze"
    patience: int = 3
    trial: int = 3
    similar: int = 3
    rest: int = 6
    least_gain: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Room of one device, in experts: at least `least` and at most `most` per layer, `total` in all."""

    least: tuple[int, ...]
    most: tuple[int, ...]
    total: int


@dataclass(frozen=True, kw_only=True)
class State:
    """The sub-model of one device and how it fares.

    Attributes
    ----------
    held : experts per layer that are trained
    scores : the last `HISTORY` scores, oldest first
    best : the highest so far, None before the first
    turns : scores ever reported
    waited : turns since the last new best or change
    before : sub-model before the change that is on trial
    frozen : no change any more
    tries : changes tried so far
    resting : move ("+layer.expert", "-layer.expert") -> turn from which it may be tried again
    """

    held: Held
    scores: tuple[float, ...] = ()
    best: float | None = None
    turns: int = 0
    waited: int = 0
    before: Held | None = None
    frozen: bool = False
    tries: int = 0
    resting: dict[str, int] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """Experts in all layers together."""
        return sum(map(len, self.held))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one turn told: a score (higher is better) and the activation [L, E] on the device's own rows."""

    score: float
    activation: Floats


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another device: its activation [L, E] and the size of its sub-model."""

    activation: Floats
    experts: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a turn changed. "keep": the trial was passed; "revert": it was not, and the change is undone."""

    kind: Literal["none", "grow", "shrink", "keep", "revert"] = "none"
    added: Moves = ()
    removed: Moves = ()


def step(
    state: State, report: Report, peers: Mapping[str, Peer], limits: Limits, rules: Rules
) -> tuple[State, Change]:
    """Take one turn's report.

    Parameters
    ----------
    peers : the other devices with statistics, by name

    Returns
    -------
    (State, Change)

    Examples
    --------
    A device with one expert has not improved for one turn; its only peer holds two and likes expert 2.

    >>> import numpy as np
    >>> p = np.array([[0.2, 0.2, 0.6]])
    >>> limits, rules = Limits(least=(1,), most=(2,), total=2), Rules(patience=1)
    >>> state = State(held=((0,),), best=0.5)
    >>> peers = {"b": Peer(activation=p, experts=2)}
    >>> state, change = step(state, Report(score=0.5, activation=p), peers, limits, rules)
    >>> change.kind, state.held, state.before
    ('grow', ((0, 2),), ((0,),))
    """
    better = state.best is None or report.score > state.best + rules.least_gain
    state = replace(
        state,
        scores=(*state.scores, report.score)[-HISTORY:],
        best=report.score if better else state.best,
        turns=state.turns + 1,
        waited=0 if better else state.waited + 1,
    )
    if state.before is not None:
        return _trial(state, state.before, better, rules)
    if better or state.frozen or state.waited < rules.patience:
        return state, Change()
    return _change(state, report, peers, limits, rules)


def _trial(state: State, before: Held, better: bool, rules: Rules) -> tuple[State, Change]:
    if better:
        return replace(state, before=None), Change(kind="keep")
    if state.waited < rules.trial:
        return state, Change()
    undo = difference(state.held, before, "revert")
    resting = {move: turn for move, turn in state.resting.items() if turn > state.turns}
    if rules.mode == "retry":
        until = state.turns + rules.rest + 1
        resting |= {_name("+", m): until for m in undo.removed}
        resting |= {_name("-", m): until for m in undo.added}
    state = replace(
        state,
        held=before,
        before=None,
        waited=0,
        frozen=rules.mode == "freeze",
        resting=resting,
    )
    return state, undo


def _change(
    state: State, report: Report, peers: Mapping[str, Peer], limits: Limits, rules: Rules
) -> tuple[State, Change]:
    others = {device: peer.activation for device, peer in peers.items()}
    near = similarity.similar(report.activation, others, rules.similar)
    if not near:
        return state, Change()
    phat = similarity.recommended([others[d] for d in near], list(near.values()))
    mean = sum(peers[d].experts for d in near) / len(near)
    wanted = math.floor(mean + 0.5) - state.experts  # halves up; the paper does not round
    rest = frozenset(move for move, turn in state.resting.items() if turn > state.turns)
    kind: Literal["grow", "shrink"] = "grow" if wanted > 0 else "shrink"
    move = grown if wanted > 0 else shrunk
    held = move(state.held, phat, abs(wanted), limits, rest)
    if held == state.held:  # the right size already, or no room, or all moves rest
        return state, Change()
    change = difference(state.held, held, kind)
    state = replace(state, held=held, before=state.held, waited=0, tries=state.tries + 1)
    return state, change


def _name(sign: str, move: tuple[int, int]) -> str:
    return f"{sign}{move[0]}.{move[1]}"


def grown(
    held: Held, phat: Floats, count: int, limits: Limits, resting: frozenset[str] = frozenset()
) -> Held:
    """Add the `count` experts outside with the highest `phat`, as far as there is room.

    Parameters
    ----------
    phat : [L, E], recommended activation
    resting : moves that are not made, "+layer.expert"

    Examples
    --------
    Layer 0 is full, so its expert 1 has to stay outside.

    >>> import numpy as np
    >>> phat = np.array([[0.1, 0.9], [0.4, 0.6]])
    >>> grown(((0,), (0,)), phat, 2, Limits(least=(1, 1), most=(1, 2), total=4))
    ((0,), (0, 1))
    """
    layers = [set(layer) for layer in held]
    for layer, expert in reversed(_ranked(phat)):
        room = limits.total - sum(map(len, layers))
        if count <= 0 or room <= 0:
            break
        fits = expert not in layers[layer] and len(layers[layer]) < limits.most[layer]
        if fits and _name("+", (layer, expert)) not in resting:
            layers[layer].add(expert)
            count -= 1
    return tuple(tuple(sorted(layer)) for layer in layers)


def shrunk(
    held: Held, phat: Floats, count: int, limits: Limits, resting: frozenset[str] = frozenset()
) -> Held:
    """Remove the `count` experts inside with the lowest `phat`; no layer falls below its least.

    Parameters
    ----------
    phat : [L, E], recommended activation
    resting : moves that are not made, "-layer.expert"

    Examples
    --------
    >>> import numpy as np
    >>> phat = np.array([[0.1, 0.9], [0.4, 0.6]])
    >>> shrunk(((0, 1), (0, 1)), phat, 2, Limits(least=(1, 1), most=(2, 2), total=4))
    ((1,), (1,))
    """
    layers = [set(layer) for layer in held]
    for layer, expert in _ranked(phat):
        if count <= 0:
            break
        fits = expert in layers[layer] and len(layers[layer]) > limits.least[layer]
        if fits and _name("-", (layer, expert)) not in resting:
            layers[layer].remove(expert)
            count -= 1
    return tuple(tuple(sorted(layer)) for layer in layers)


def _ranked(phat: Floats) -> list[tuple[int, int]]:
    """(layer, expert) by rising phat; of equal ones the last comes first, so that the first is the last to go."""
    places = [(i, e) for i in range(phat.shape[0]) for e in range(phat.shape[1])]
    return sorted(places, key=lambda p: (phat[p], -p[0], -p[1]))


def difference(old: Held, new: Held, kind: Literal["grow", "shrink", "revert"]) -> Change:
    """The moves from one sub-model to another."""
    pairs = list(enumerate(zip(old, new, strict=True)))
    return Change(
        kind=kind,
        added=tuple((i, e) for i, (o, n) in pairs for e in n if e not in o),
        removed=tuple((i, e) for i, (o, n) in pairs for e in o if e not in n),
    )


def to_json(state: State) -> str:
    """One line of JSON; the same state gives the same text."""
    return json.dumps(schema.to_dict(state), sort_keys=True)


def from_json(text: str, layers: int, experts: int) -> State:
    """Inverse of `to_json`, checked against the base.

    Raises
    ------
    StructureError
        Not JSON, not a state, another number of layers, an expert that does not exist.
    """
    try:
        state = schema.from_dict(State, json.loads(text), "structure")
    except schema.SchemaError as error:
        raise StructureError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise StructureError(f"structure: not JSON: {error}") from error
    for held in (state.held, state.before or state.held):
        if len(held) != layers:
            raise StructureError(f"structure: {len(held)} layers found, {layers} wanted")
        for layer in held:
            if list(layer) != sorted(set(layer)) or any(not 0 <= e < experts for e in layer):
                raise StructureError(
                    f"structure: experts {list(layer)[:8]} found, ascending ids below {experts} wanted"
                )
    return state

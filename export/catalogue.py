"""The catalogue of shapes: what is rounded so that devices with nearly the same budgets share a program (pure).

Room, which is what remains of a cap beside the fixed costs, is rounded down to a step of 2^(1/8); theta comes in
steps of 1/20; the batch is halved down to one row, then the sequence down to 32 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

ROOM_STEPS = 8  # per octave
THETA_STEPS = 20
SHORTEST = 32


def round_down(room: float) -> float:
    """The largest room of the catalogue that is not larger.

    >>> round_down(1024.0), round_down(1116.0), round(round_down(1117.0), 2)
    (1024.0, 1024.0, 1116.68)
    """
    if room <= 0:
        return 0.0
    return float(2 ** (math.floor(math.log2(room) * ROOM_STEPS + 1e-9) / ROOM_STEPS))


def thetas(wanted: float) -> Iterator[float]:
    """The wanted floor, then lower ones down to 0.

    >>> list(thetas(0.12))
    [0.12, 0.1, 0.05, 0.0]
    """
    yield wanted
    for step in range(math.ceil(wanted * THETA_STEPS - 1e-9) - 1, -1, -1):
        yield step / THETA_STEPS


def sizes(batch: int, sequence: int, *, fixed: frozenset[str]) -> Iterator[tuple[int, int]]:
    """(batch, sequence), largest first; a size in `fixed` stays.

    >>> list(sizes(4, 64, fixed=frozenset()))
    [(4, 64), (2, 64), (1, 64), (1, 32)]
    >>> list(sizes(4, 64, fixed=frozenset({"batch"})))
    [(4, 64), (4, 32)]
    """
    yield batch, sequence
    while "batch" not in fixed and batch > 1:
        batch = (batch + 1) // 2
        yield batch, sequence
    while "sequence" not in fixed and sequence // 2 >= SHORTEST:
        sequence //= 2
        yield batch, sequence

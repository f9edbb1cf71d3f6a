"""How many experts a device has to download anew in a round, with and without regard to what it holds.

    python -m benchmarks.expert_moves [--devices 100] [--rounds 5]

Values are made up: half of each device's value for an expert is the fleet's, half its own, drawn afresh each round and
smoothed as the server does. 16 layers of 64 experts, 8 to 28 slots a layer, of which 4 are frozen. Prints the share of
slots that need another blob than in the round before, and the seconds that choosing takes.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from protocol.manifest import Slot
from server.choose_experts import Chosen, choose
from server.expert_values import Floats, smooth

LAYERS, EXPERTS, TOP_K = 16, 64, 8
FULL, HALF, FROZEN = (Slot(format="int4", rank=rank) for rank in (8, 4, 0))
Slots = list[list[Slot]]


def fleet(devices: int, rng: np.random.Generator) -> dict[str, Slots]:
    """Slots of a mixed fleet."""
    return {
        f"d{i}": [
            [FULL] * int(n // 2) + [HALF] * int(n - n // 2) + [FROZEN] * 4
            for n in rng.integers(4, 25, LAYERS)
        ]
        for i in range(devices)
    }


def drawn(common: Floats, rng: np.random.Generator) -> Floats:
    """One device's values of one round, rows sum to 1."""
    return np.asarray((common + rng.dirichlet(np.full(EXPERTS, 0.5), LAYERS)) / 2, np.float64)


def moved(before: Chosen, after: Chosen) -> int:
    """Experts that were not there before; all slots here have one format."""
    return sum(len(set(new) - set(old)) for old, new in zip(before, after, strict=True))


def measure(devices: int, rounds: int, keep: bool) -> tuple[float, float]:
    """Share of slots with another expert than the round before; median seconds of a choice."""
    rng = np.random.default_rng(0)
    slots = fleet(devices, rng)
    common = rng.dirichlet(np.full(EXPERTS, 0.5), LAYERS)
    values = {d: drawn(common, rng) for d in slots}
    held = choose(values, slots, top_k=TOP_K, coverage=0.5, seed=0)
    shares, seconds = [], []
    for _ in range(rounds):
        values = {d: smooth(v, drawn(common, rng)) for d, v in values.items()}
        start = time.perf_counter()
        former = held if keep else None
        chosen = choose(values, slots, top_k=TOP_K, coverage=0.5, seed=0, former=former)
        seconds.append(time.perf_counter() - start)
        whole = sum(len(layer) for layers in chosen.values() for layer in layers)
        shares.append(sum(moved(held[d], chosen[d]) for d in chosen) / whole)
        held = chosen
    return float(np.mean(shares)), float(np.median(seconds))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for what, keep in (("afresh", False), ("from what is held", True)):
        share, seconds = measure(args.devices, args.rounds, keep)
        print(f"{what}: {share:.1%} of the slots change per round, chosen in {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

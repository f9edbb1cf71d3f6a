"""How many experts a device has room for: slots per layer under a memory budget (pure).

Letters: L MoE layers, E experts, P slots of a layer, T = batch * sequence tokens, d hidden, f intermediate, R rank.

The peak is taken over the process's size just before the program is opened. Inputs, parameters and optimizer state are
counted exactly from the shape; the arena is estimated while slots are chosen and is exact once the program is lowered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from export.routed_experts import blocks_needed
from export.train_graph import BLOCK_ROWS
from protocol.manifest import BaseIndex, MemoryPlan, Program, Shape, TensorSpec

STEPS = 20
# What the runtime and the allocator take beside the counted terms, measured in the demo's devices.
RUNTIME_BYTES = 11 << 20


class DoesNotFit(ValueError):
    """Not even the smallest sub-MoE fits the budget."""


def spec_bytes(specs: Sequence[TensorSpec]) -> int:
    """Bytes of a list of tensors."""
    return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in specs)


def memory(
    train: Program, evaluate: Program, shape: Shape, vocabulary: int, budget: int
) -> MemoryPlan:
    """Predicted peak of the heavier of the two programs; only one is open at a time."""
    trained = spec_bytes(train.parameters)
    largest = max(spec_bytes([p]) for p in train.parameters)
    while_training = MemoryPlan(
        budget=budget,
        arena=train.arena_bytes,
        inputs=spec_bytes(train.inputs),
        # values live in the program's file, which is held in memory; gradients are in the arena
        parameters=train.blob.bytes + trained,
        optimizer=2 * trained + 3 * largest,  # AdamW's two moments and its temporaries
        outputs=64 << 10,
        runtime=RUNTIME_BYTES,
    )
    answers = shape.batch * shape.answers * vocabulary * 4
    while_evaluating = MemoryPlan(
        budget=budget,
        arena=evaluate.arena_bytes,
        inputs=spec_bytes(evaluate.inputs),
        parameters=evaluate.blob.bytes,
        optimizer=0,
        outputs=2 * answers,
        runtime=RUNTIME_BYTES,
    )
    return max(while_training, while_evaluating, key=lambda plan: plan.predicted)


def estimate(base: BaseIndex, shape: Shape) -> int:
    """Peak bytes while training, before anything is lowered; within a few percent of what lowering then says.

    The arena's part: per layer what the backward pass needs of each seated row and of each token, plus one layer's
    dequantised blocks. The coefficients were fitted to lowered programs (4 to 16 slots, 128 to 1024 tokens).
    """
    tokens = shape.batch * shape.sequence
    d, f = base.hidden, base.intermediate
    heads = int(base.config.get("num_attention_heads", 1))
    layers, slots = len(shape.slots), sum(shape.slots)
    blocks = [blocks_needed(base.top_k * tokens, p, BLOCK_ROWS) for p in shape.slots]
    seated = sum(blocks) * BLOCK_ROWS * (2 * d + 2 * f)
    attended = layers * tokens * (8 * d + heads * shape.sequence)
    dequantised = max(blocks) * 2 * f * d * 1.2
    adapter = slots * (shape.rank * (2 * d + 3 * f + d) + d)
    packed = slots * 3 * d * f * (0.5 + 4 / shape.group)
    floats = seated + attended + dequantised + 6 * adapter
    return int(4 * floats + packed + 2 * base.dense.bytes + RUNTIME_BYTES)


def slots_for(threshold: float, prior: NDArray[np.float64], least: int) -> tuple[int, ...]:
    """Per layer the fewest experts whose routing mass reaches `threshold` (FedMoE's theta, method.md 3.3).

    >>> slots_for(0.7, np.array([[0.6, 0.2, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]), 1)
    (2, 3)
    """
    ordered = np.cumsum(-np.sort(-prior, axis=1), axis=1)
    need = (ordered < threshold - 1e-9).sum(1) + 1
    return tuple(int(n) for n in np.clip(need, least, prior.shape[1]))


def choose_slots(
    prior: NDArray[np.float64], least: int, fits: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...]:
    """The slots of the highest threshold that fits.

    Thresholds are steps of 1/20, so that devices of nearly the same budget share one program.

    Parameters
    ----------
    prior : [L, E], rows sum to 1
    least : int
        Fewest slots of a layer (the router's top-k).
    fits : callable
        Whether a vector of slots is within the budget; must be monotone.

    Raises
    ------
    DoesNotFit
    """
    for step in range(STEPS, -1, -1):
        slots = slots_for(step / STEPS, prior, least)
        if fits(slots):
            return slots
    raise DoesNotFit(f"{least} experts in each of {len(prior)} layers do not fit")


def next_lower(
    prior: NDArray[np.float64], least: int, slots: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The catalogue's next smaller vector of slots; None below the smallest."""
    try:
        return choose_slots(prior, least, lambda s: sum(s) < sum(slots))
    except DoesNotFit:
        return None


def choose_experts(mass: NDArray[np.float64], slots: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The experts with the most routing mass, as many per layer as there are slots; ascending ids."""
    return [
        tuple(sorted(int(e) for e in np.argsort(-row, kind="stable")[:n]))
        for row, n in zip(mass, slots, strict=True)
    ]

"""What a shape costs a device: bytes of memory, flash and uplink (pure, from sizes alone).

Letters: L MoE layers, P slots of a layer, B batch rows, S tokens per row, T = B * S, K answer positions per row, d
hidden, u rows of an expert's first projection, k experts per token, V vocabulary, R rank.

Inputs, parameters and optimizer state follow exactly from the shape. The arena is an estimate, exact once the program
is lowered: its coefficients were fitted to lowered programs, see `benchmarks.memory_prediction`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from export import families, local_objective, seq2seq_costs
from export.families.family import Family
from export.train_graph import dense_names, skeleton
from protocol import packing
from protocol.manifest import BaseIndex, MemoryPlan, Program, Shape, Slot, TensorSpec

RUNTIME_BYTES = 16 << 19
"""What runtime, code and allocator take beside the counted terms: fitted with `benchmarks.memory_prediction`, then
raised by 1.5 MiB to the peaks of `scripts/demo`, with one MiB for what a process gathers from round to round."""
COLUMNS = 256  # tokens that an operator takes at a time (edge/native/product.h)
THREAD_BYTES = 256 << 10  # scratch of a thread
THREADS = 4  # most that are counted
PROGRAM_BYTES = 96 << 10  # both programs of a shape, per layer
SCRATCH = 4  # copies of one expert's largest factor that an optimizer step makes
FLOAT = 4
_LAYER = re.compile(r"(?:layers|block|layer|h)\.(\d+)\.")
_LAST = ("o_proj", "down_proj", "o", "wo")  # matrices whose output is added to the hidden state


@dataclass(frozen=True)
class Dense:
    """The part of a base that every device holds."""

    shapes: Mapping[str, tuple[int, ...]]
    linear: int  # weights of the matrices that every token passes
    kept: int  # floats per token that the backward pass needs of them
    head: int  # weights of the output layer
    widest: int  # largest side of the matrices that every token passes

    def bytes(self, format: str) -> int:
        """Bytes as inputs of a program."""
        total = 0
        for shape in self.shapes.values():
            size = math.prod(shape)
            if packing.packs(shape):
                total += packing.packed_bytes(format, 1, size) + 2 * (size // packing.GROUP)
            else:
                total += FLOAT * size
        return total


def family_of(base: BaseIndex) -> Family:
    """The family that a base belongs to."""
    return families.of(base.config, base.base[:12])


def dense_of(base: BaseIndex) -> Dense:
    """Sizes of a base's dense tensors, from its configuration alone; takes a second for the largest models."""
    shapes = dense_names(skeleton(base), base, family_of(base))
    wide = [shape for shape in shapes.values() if len(shape) == 2 and shape[0] != base.vocabulary]
    return Dense(
        shapes,
        sum(math.prod(shape) for shape in wide),
        _kept(shapes, base),
        base.vocabulary * base.hidden,
        max((max(shape) for shape in wide), default=0),
    )


def _kept(shapes: Mapping[str, tuple[int, ...]], base: BaseIndex) -> int:
    """Floats per token that the backward pass needs of the dense matrices.

    A frozen matrix needs nothing of its own, so that these are the inputs of what is not linear: queries, keys and
    values, once more before a norm of their own; the output of attention; gates. Below the first trained layer
    nothing is needed.
    """
    first = -1 if base.architecture == "seq2seq" else base.moe_layers[0]
    total = 0
    for name, shape in shapes.items():
        found = _LAYER.search(name)
        if found is None or len(shape) != 2:
            continue
        layer, attention = int(found[1]), "attn" in name.lower() or "attention" in name.lower()
        if layer < first or (attention and layer == first):
            continue
        path, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf in _LAST:
            total += shape[1] if attention else 0
        else:
            total += shape[0] * (2 if f"{path}.{leaf[0]}_norm.weight" in shapes else 1)
    return total


def spec_bytes(specs: Sequence[TensorSpec]) -> int:
    """Bytes of a list of tensors."""
    return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in specs)


def expert_weights(base: BaseIndex) -> int:
    """Frozen weights of one expert."""
    if base.projections == ("adapter",):
        return 0
    return sum(math.prod(base.features(p)) for p in base.projections)


def frozen_bytes(base: BaseIndex, format: str) -> int:
    """One expert's packed weights and scales."""
    if format == "none":
        return 0
    size = expert_weights(base)
    return packing.packed_bytes(format, 1, size) + 2 * (size // base.group)


def adapter_floats(base: BaseIndex, rank: int) -> int:
    """LoRA factors of one expert."""
    return rank * sum(sum(base.features(p)) for p in base.projections)


def slot_memory(base: BaseIndex, slot: Slot) -> int:
    """Peak bytes of one more slot: frozen weights, router row, its balance target; value, gradient and moments of what
    is trained."""
    trained = adapter_floats(base, slot.rank) + base.hidden
    return frozen_bytes(base, slot.format) + FLOAT * (base.hidden + 1 + 4 * trained)


def slot_flash(base: BaseIndex, slot: Slot) -> int:
    """Bytes on flash: the blob, the adapter as received, the update waiting to be sent."""
    blob = base.experts[slot.format][0][0].bytes if slot.format != "none" else 0
    return blob + 2 * slot_uplink(base, slot)


def flash(base: BaseIndex, shape: Shape) -> dict[str, int]:
    """Bytes on flash by what they are."""
    slots = [slot for layer in shape.slots for slot in layer]
    adapter = 2 * sum(slot_uplink(base, slot) for slot in slots)
    return {
        "experts": sum(slot_flash(base, slot) for slot in slots) - adapter,
        "dense": base.dense[shape.dense].bytes,
        "tokenizer": base.tokenizer.bytes,
        "programs": PROGRAM_BYTES * len(base.moe_layers),
        "adapter and update": adapter,
    }


def slot_uplink(base: BaseIndex, slot: Slot) -> int:
    """Bytes of a trained expert in an update, float32."""
    return FLOAT * (adapter_floats(base, slot.rank) + base.hidden) if slot.rank else 0


def inputs_bytes(base: BaseIndex, dense: Dense, shape: Shape) -> int:
    """Bytes of a training program's inputs other than the adapter; `Program.inputs` once it is lowered."""
    batch = shape.batch * shape.sequence * 12 + shape.batch * shape.answers * 20
    slots = [slot for layer in shape.slots for slot in layer]
    rows = FLOAT * (base.hidden + 1) * len(slots)  # router rows, and the target of their balance
    terms = FLOAT * (len(local_objective.INPUTS) + base.vocabulary)
    frozen = sum(frozen_bytes(base, s.format) for s in slots)
    return batch + terms + dense.bytes(shape.dense) + rows + frozen


def parameter_floats(base: BaseIndex, shape: Shape) -> int:
    """Numbers of the resident experts' adapter, router rows and output scales and all."""
    slots = [slot for layer in shape.slots for slot in layer]
    factors = adapter_floats(base, sum(slot.rank for slot in slots))
    return factors + len(slots) * base.hidden + len(shape.slots)


def largest_factor(base: BaseIndex, shape: Shape) -> int:
    """Numbers of the largest LoRA factor of an expert."""
    rank = max((slot.rank for layer in shape.slots for slot in layer), default=0)
    return rank * max(side for p in base.projections for side in base.features(p))


def arena_bytes(base: BaseIndex, dense: Dense, shape: Shape) -> int:
    """Estimated arena of the training program.

    Kept until a layer's backward pass: `Dense.kept`, what the experts' first projections put out, two copies of the
    hidden state, one more beside a shared expert. Above that either a layer at work with its gradients, or the
    logits. Gradients are outputs: when they are all there, only the first layer is left.
    """
    tokens = shape.batch * shape.sequence
    if base.projections == ("adapter",):
        wide = max((sum(slot.rank for slot in layer) for layer in shape.slots), default=0)
    else:
        wide = base.top_k * base.features(base.projections[0])[0]
    shared = family_of(base).shared is not None
    slots = max((len(layer) for layer in shape.slots), default=0)
    # Of the router: logits and probabilities, for the terms of the objective.
    routed = tokens * (wide + (3 if shared else 2) * base.hidden + 2 * slots)
    saved = tokens * dense.kept + len(base.moe_layers) * routed
    if base.architecture == "seq2seq":
        saved = seq2seq_costs.kept(dense.shapes, base, shape)
    working = 5.5 * tokens * base.hidden
    logits = 4.05 * shape.batch * shape.answers * base.vocabulary
    gradients = [parameter_floats(base, replace(shape, slots=(layer,))) for layer in shape.slots]
    begin = saved + max(working + max(gradients, default=0), logits)
    return int(FLOAT * max(begin, routed + working + sum(gradients)))


def runtime_bytes(base: BaseIndex, dense: Dense, shape: Shape) -> int:
    """The runtime, and its operators' scratch: activations of up to `COLUMNS` tokens (edge/native/ops.cpp)."""
    tokens = min(COLUMNS, -(-shape.batch * shape.sequence // 16) * 16)
    answers = min(COLUMNS, -(-shape.batch * shape.answers // 16) * 16)
    d, f = base.hidden, base.intermediate
    up = base.features(base.projections[0])[0]
    rank = max((slot.rank for layer in shape.slots for slot in layer), default=0)
    first = max(d * tokens, dense.widest * tokens, base.vocabulary * answers)
    floats = first + tokens * (max(d, up) + max(up, f) + max(d, f) + f + 2 * rank)
    return RUNTIME_BYTES + THREADS * THREAD_BYTES + FLOAT * floats


def estimate(base: BaseIndex, dense: Dense, shape: Shape, budget: int) -> MemoryPlan:
    """Predicted peak while training, before anything is lowered."""
    total = parameter_floats(base, shape)
    return MemoryPlan(
        budget=budget,
        arena=arena_bytes(base, dense, shape),
        inputs=inputs_bytes(base, dense, shape),
        parameters=FLOAT * total,
        optimizer=FLOAT * (2 * total + SCRATCH * largest_factor(base, shape)),
        outputs=64 << 10,
        runtime=runtime_bytes(base, dense, shape),
    )


def memory(
    base: BaseIndex, dense: Dense, train: Program, evaluate: Program, shape: Shape, budget: int
) -> MemoryPlan:
    """Predicted peak of the heavier of the two lowered programs; only one is open at a time."""
    trained = spec_bytes(train.parameters)  # among the inputs
    largest = FLOAT * largest_factor(base, shape)
    while_training = MemoryPlan(
        budget=budget,
        arena=train.arena_bytes,
        inputs=spec_bytes(train.inputs) - trained,
        parameters=trained,
        optimizer=2 * trained + SCRATCH * largest,
        outputs=64 << 10,
        runtime=runtime_bytes(base, dense, shape),
    )
    answers = shape.batch * shape.answers * base.vocabulary * FLOAT
    while_evaluating = MemoryPlan(
        budget=budget,
        arena=evaluate.arena_bytes,
        inputs=spec_bytes(evaluate.inputs) - trained,
        parameters=2 * trained,  # what was trained, and its copy among the inputs
        optimizer=0,
        outputs=2 * answers,
        runtime=runtime_bytes(base, dense, shape),
    )
    return max(while_training, while_evaluating, key=lambda plan: plan.predicted)

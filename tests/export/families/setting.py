"""A tiny sliced base of every family, as an artifact with mixed slots, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from edge import slots
from edge.session import PLAIN, Artifact, Batch
from edge.session_executorch import objective_inputs
from export import families
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint
from export.slice_base import slice_base
from export.train_graph import adapter_specs
from protocol import PROTOCOL_VERSION, names, tensors
from protocol.manifest import (
    BaseIndex,
    Blob,
    Manifest,
    MemoryPlan,
    Program,
    Shape,
    Slot,
    TensorSpec,
)
from tests.export.families import tiny

SLOTS = (
    Slot(format="int8", rank=4),
    Slot(format="int4", rank=4),
    Slot(format="int4", rank=2),
    Slot(format="int8", rank=0),
)
# Of eight experts in four groups: two whole groups, which is what transformers' router can be masked to.
HELD = {6: (5, 0, 3, 2), 8: (6, 1, 0, 7)}
BATCH, SEQUENCE, ANSWERS = 2, 12, 2
NO_PROGRAM = Program(
    blob=Blob(sha256="0" * 64, bytes=0),
    method="forward",
    inputs=(),
    parameters=(),
    outputs=("loss",),
    arena_bytes=0,
)


def resident_of(base: BaseIndex) -> dict[int, tuple[int, ...]]:
    """Four experts in every MoE layer."""
    return {layer: HELD[base.num_experts] for layer in base.moe_layers}


def sliced(model_type: str, root: Path) -> tuple[BaseIndex, BlobStore]:
    """Write the family's tiny checkpoint and slice it."""
    checkpoint = Checkpoint(tiny.write_checkpoint(model_type, root / "checkpoint"))
    family = families.of(checkpoint.config, str(checkpoint.path))
    store = BlobStore(root)
    return slice_base(checkpoint, family, store, lambda message: None), store


def artifact(
    base: BaseIndex,
    store: BlobStore,
    kinds: tuple[Slot, ...],
    train: Program = NO_PROGRAM,
    evaluate: Program = NO_PROGRAM,
) -> Artifact:
    """The same slots in every layer; without programs for the torch backend."""
    shape = shape_of(base, kinds)
    return Artifact(
        base,
        Manifest(
            protocol=PROTOCOL_VERSION,
            base=base.base,
            profile="tiny",
            shape=shape,
            train=train,
            evaluate=evaluate,
            dense=base.dense[shape.dense],
            tokenizer=base.tokenizer,
            memory=MemoryPlan(
                budget=1, arena=0, inputs=0, parameters=0, optimizer=0, outputs=0, runtime=0
            ),
            experts={},
        ),
        store.folder,
    )


def shape_of(base: BaseIndex, kinds: tuple[Slot, ...]) -> Shape:
    """The same slots in every layer."""
    return Shape(
        batch=BATCH,
        sequence=SEQUENCE,
        answers=ANSWERS,
        dense="int8",
        slots=(kinds,) * len(base.moe_layers),
    )


def batch(vocabulary: int, seed: int = 0) -> Batch:
    """Random tokens; the second row is shorter."""
    rng = np.random.default_rng(seed)
    valid = np.ones((BATCH, SEQUENCE), np.float32)
    valid[1, -3:] = 0
    return Batch(
        tokens=rng.integers(0, vocabulary, (BATCH, SEQUENCE)),
        valid=valid,
        positions=np.array([[3, 11], [SEQUENCE + 2, SEQUENCE + 8]]),
        targets=rng.integers(0, vocabulary, (BATCH, ANSWERS)),
        weights=np.array([[1, 1], [1, 0.5]], np.float32),
        labels=np.full(BATCH, -1, np.int64),
    )


def adapter(
    base: BaseIndex, kinds: tuple[Slot, ...], spread: float, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random values for everything the residents train."""
    rng = np.random.default_rng(seed)
    values = {}
    for layer, ids in resident_of(base).items():
        for expert, slot in zip(ids, kinds, strict=True):
            values[names.router_row(layer, expert)] = rng.normal(0, spread, base.hidden)
            for projection in base.projections:
                out, features = base.features(projection)
                for factor, shape in (
                    ("lora_A", (slot.rank, features)),
                    ("lora_B", (out, slot.rank)),
                ):
                    if slot.rank:
                        key = names.lora(layer, expert, projection, factor)
                        values[key] = rng.normal(0, spread, shape)
    return {name: value.astype(np.float32) for name, value in values.items()}


def graph_inputs(
    specs: Sequence[TensorSpec],
    artifact: Artifact,
    resident: dict[int, tuple[int, ...]],
    adapter: dict[str, np.ndarray],
    batch: Batch,
) -> list[torch.Tensor]:
    """What a program takes, in calling order."""
    base, shape = artifact.base, artifact.manifest.shape
    dense = tensors.decode(artifact.path(artifact.manifest.dense).read_bytes())
    given = {**batch.inputs(), **{f"dense.{name}": value for name, value in dense.items()}}
    given |= slots.router_inputs(dense, resident)
    given |= slots.resident_inputs(base.num_experts, resident)
    read = lambda blob: tensors.decode(artifact.path(blob).read_bytes())  # noqa: E731
    given |= slots.expert_inputs(base, shape, resident, read)
    flat = slots.fresh(adapter_specs(base, shape))
    for name, view in slots.views(flat, base, shape, resident).items():
        view[...] = adapter.get(name, 1.0)
    given |= objective_inputs(PLAIN, resident, artifact.base.vocabulary)
    for layer, ids in resident.items():
        name = f"layers.{layer}.router_all"
        given[name] = slots.with_deltas(given[name], flat[f"layers.{layer}.router"], ids)
    ordered = slots.check_inputs({**given, **flat}, specs, "graph")
    return [torch.from_numpy(np.array(value)) for value in ordered.values()]

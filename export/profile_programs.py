"""Lower the programs of full profiling once for all shapes that share them, and say what they need."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from export import profile_graph
from export.blob_store import BlobStore, write_atomically
from export.families.family import Family
from export.profile_graph import EmbedModel, ExpertModel, LayerModel
from export.to_executorch import lower
from export.train_graph import skeleton
from protocol import PROTOCOL_VERSION, packing, schema
from protocol.manifest import BaseIndex, Profiling, Program, Shape, TensorSpec

RUNTIME_BYTES = 6 << 20
"""Runtime, code, scratch of its threads and the allocator's holes: measured with `benchmarks.profiling`."""
BATCH_COPIES = (
    2  # a batch's hidden state at once: as input, and as what the program reads and writes
)


def expert_format(base: BaseIndex) -> str:
    """The format experts are profiled in: the smallest there is, of two the first in `packing.FORMATS`."""
    return min(base.experts, key=lambda f: (packing.BITS[f], packing.FORMATS.index(f)))


def rank_of(shape: Shape) -> int:
    """The rank of the adapter that is profiled: the highest of the slots."""
    return max(slot.rank for layer in shape.slots for slot in layer)


def _key(base: BaseIndex, shape: Shape) -> str:
    """What decides the programs' bytes."""
    folder = Path(__file__).parent
    named = ("profile_graph", "train_graph", "packed_modules", "ops", "graph_passes")
    files = [folder / f"{name}.py" for name in (*named, "to_executorch")]
    files += sorted((folder / "families").glob("*.py"))
    facts = {
        "protocol": PROTOCOL_VERSION,
        "config": base.config,
        "shape": [shape.batch, shape.sequence, shape.dense, expert_format(base), rank_of(shape)],
        "tools": {name: version(name) for name in ("torch", "executorch", "transformers")},
        "graph": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _program(model: EmbedModel | LayerModel | ExpertModel, store: BlobStore) -> Program:
    lowered = lower(profile_graph.capture(model, model.specs))
    return Program(
        blob=store.put(lowered.program),
        method="forward",
        inputs=tuple(model.specs),
        parameters=(),
        outputs=model.outputs,
        arena_bytes=lowered.arena_bytes,
    )


def lower_profiling(
    base: BaseIndex,
    family: Family,
    shape: Shape,
    store: BlobStore,
    advance: Callable[[str], None] = lambda stage: None,
) -> Profiling:
    """Capture, lower and store the programs, or find them in the store.

    Raises
    ------
    FamilyError
        The base cannot be run layer by layer; one line.
    """
    profile_graph.check(base)
    index = store.root / "programs" / f"profiling-{_key(base, shape)}.json"
    if index.is_file():
        known = schema.from_dict(Profiling, json.loads(index.read_bytes()), str(index))
        if all((store.folder / p.blob.sha256).is_file() for p in known.programs()):
            advance("profiling: already there")
            return known
    format, rank = expert_format(base), rank_of(shape)
    rows = (shape.batch, shape.sequence)
    first, kinds = profile_graph.kinds(base, family)
    made = Profiling(
        embed=_program(EmbedModel(base, family, *rows, shape.dense), store),
        layers=tuple(
            _program(LayerModel(base, family, layer, *rows, shape.dense), store) for layer in first
        ),
        kinds=kinds,
        place=profile_graph.place(skeleton(base)),
        expert=_program(ExpertModel(base, family, format, rank), store),
        format=format,
        rank=rank,
        scale=profile_graph.scale_of(base),
    )
    write_atomically(index, json.dumps(schema.to_dict(made)).encode())
    advance(f"profiling: {sum(p.blob.bytes for p in made.programs()) / 1e6:.1f} MB")
    return made


def _bytes(specs: tuple[TensorSpec, ...]) -> int:
    return sum(math.prod(s.shape) * np.dtype(s.dtype).itemsize for s in specs)


def predicted(profiling: Profiling, shape: Shape, base: BaseIndex) -> dict[str, int]:
    """Predicted peak bytes of profiling by what they are: at most dense + one expert + buffers.

    Whatever the model, one layer's dense part and one expert are in memory; hidden states of all rows are on flash.
    """
    tokens = shape.batch * shape.sequence
    hidden = 4 * tokens * base.hidden
    batch_inputs = ("tokens", "hidden", "x")
    dense = [
        sum(_bytes((s,)) for s in p.inputs if s.name not in batch_inputs)
        for p in (profiling.embed, *profiling.layers)
    ]
    expert = _bytes(profiling.expert.inputs[1:])
    chunk = 4 * _bytes(profiling.expert.inputs[:1])
    while_attending = max(p.arena_bytes for p in (profiling.embed, *profiling.layers))
    while_attending += BATCH_COPIES * hidden
    return {
        "dense": max(dense),
        "one expert": expert,
        "buffers": max(while_attending, profiling.expert.arena_bytes + chunk),
        "runtime": RUNTIME_BYTES,
    }

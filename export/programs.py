"""One training and one evaluation program per shape, lowered once and found again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from export.blob_store import BlobStore, write_atomically
from export.families.family import Family
from export.to_executorch import lower
from export.train_graph import SubModel, capture
from protocol import PROTOCOL_VERSION, schema
from protocol.manifest import BaseIndex, Program, Shape


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Both programs of a shape."""

    train: Program
    evaluate: Program


def shape_key(base: BaseIndex, shape: Shape) -> str:
    """What decides a program's bytes: the model's configuration, the shape, the tools; not the weights."""
    facts = {
        "protocol": PROTOCOL_VERSION,
        "config": base.config,
        "shape": schema.to_dict(shape),
        "tools": {name: version(name) for name in ("torch", "executorch", "transformers")},
        "graph": _source_hash(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _source_hash() -> str:
    """Changes whenever the code that draws the graph does."""
    folder = Path(__file__).parent
    named = (
        "train_graph",
        "local_objective",
        "seq2seq",
        "routed_experts",
        "adapter_experts",
        "packed_modules",
        "ops",
        "graph_passes",
        "to_executorch",
    )
    files = [folder / f"{name}.py" for name in named] + sorted((folder / "families").glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def lower_program(
    base: BaseIndex, family: Family, shape: Shape, store: BlobStore, *, evaluate: bool
) -> Program:
    """Capture, lower and store one program."""
    model = SubModel(base, family, shape, evaluate)
    lowered = lower(capture(model))
    return Program(
        blob=store.put(lowered.program),
        method="forward",
        inputs=tuple(model.specs),
        parameters=tuple(model.adapter),
        outputs=model.output_names(),
        arena_bytes=lowered.arena_bytes,
    )


def lower_programs(
    base: BaseIndex, family: Family, shape: Shape, store: BlobStore, advance: Callable[[str], None]
) -> Programs:
    """Capture, lower and store both programs, or find them in the store.

    Parameters
    ----------
    advance : callable
        Told of each finished program.
    """
    index = store.folder.parent / "programs" / f"{shape_key(base, shape)}.json"
    if index.is_file():
        known = schema.from_dict(Programs, json.loads(index.read_bytes()), str(index))
        if all((store.folder / p.blob.sha256).is_file() for p in (known.train, known.evaluate)):
            advance("train: already there")
            advance("evaluate: already there")
            return known
    made = {}
    for kind in ("train", "evaluate"):
        made[kind] = lower_program(base, family, shape, store, evaluate=kind == "evaluate")
        advance(f"{kind}: {made[kind].blob.bytes / 1e6:.1f} MB")
    programs = Programs(**made)
    write_atomically(index, json.dumps(schema.to_dict(programs)).encode())
    return programs

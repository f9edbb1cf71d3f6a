"""Checkpoint -> base index: every expert quantised into blobs of its own, one per format; the rest into dense blobs.

Tensors are read, packed and written piece by piece; what an earlier build has finished is not read again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export import families, outline
from export.blob_store import BlobStore, OtherBlob
from export.checkpoint import Checkpoint, CheckpointError
from export.families.family import Family
from export.journal import Journal
from export.quantize import quantize
from export.slice_dense import slice_dense
from export.train_graph import dense_names, skeleton
from protocol import tensors
from protocol.manifest import BaseIndex, Blob, ManifestError, read_base, to_json

Shape = tuple[int, ...]
Place = tuple[int, int]  # layer, expert
FORMATS = ("int4", "int8")
"""Sliced unless asked otherwise: what the planner chooses from."""
SLICER = 1
"""To be raised when the same checkpoint gives other bytes: what was sliced before is then not taken up."""


def _read(
    base: BaseIndex, checkpoint: Checkpoint, family: Family, projection: str, place: Place
) -> Tensor:
    """One projection of one expert, [out, in] as stored: from the layer's fused tensor or from the expert's own."""
    layer, expert = place
    wanted = base.features(projection)
    fused = family.fused.get(projection, "").format(layer=layer)
    if fused in checkpoint:
        _check(checkpoint, f"'{fused}'", checkpoint.shape(fused), (base.num_experts, *wanted))
        return checkpoint.raw(fused, expert, expert + 1)[0]
    parts = [
        checkpoint.raw(part.format(layer=layer, expert=expert)) for part in family.split[projection]
    ]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    what = f"{projection} of expert {expert} in layer {layer}"
    _check(checkpoint, what, tuple(weight.shape), wanted)
    return weight


def _check(checkpoint: Checkpoint, what: str, found: Shape, wanted: Shape) -> None:
    if found != wanted:
        raise CheckpointError(f"{checkpoint.path}: {what} is {list(found)}, {list(wanted)} wanted")


def _slice_expert(
    base: BaseIndex,
    checkpoint: Checkpoint,
    family: Family,
    store: BlobStore,
    place: Place,
    formats: Sequence[str],
) -> dict[str, Any]:
    """Write the blobs of one expert: format -> [sha256, bytes, squared error]; "weight" -> sum of squared weights."""
    named: dict[str, dict[str, Any]] = {format: {} for format in formats}
    squared, total = dict.fromkeys(formats, 0.0), 0.0
    for projection in base.projections:
        weight = _read(base, checkpoint, family, projection, place)
        try:
            packed, energy = quantize(weight, formats)
        except ValueError as error:
            what = f"{projection} of expert {place[1]} in layer {place[0]}"
            raise CheckpointError(f"{checkpoint.path}: {what}: {error}") from error
        total += energy
        for format, part in packed.items():
            named[format][f"{projection}.packed"] = part.packed
            named[format][f"{projection}.scale"] = part.scale
            squared[format] += part.squared_error
    found: dict[str, Any] = {"weight": total}
    for format, parts in named.items():
        blob = store.put(tensors.encode(parts))
        found[format] = [blob.sha256, blob.bytes, squared[format]]
    return found


def _prior(checkpoint: Checkpoint, layers: int, experts: int) -> tuple[tuple[float, ...], ...]:
    """Mean routing mass on the base's own text, or uniform where the checkpoint brings none."""
    path = checkpoint.path / "routing_prior.json"
    if not path.is_file():
        return ((1 / experts,) * experts,) * layers
    try:
        mass = np.asarray(json.loads(path.read_bytes())["layers"], dtype=np.float64)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: [{layers}, {experts}] masses wanted: {error}") from error
    if mass.shape != (layers, experts) or not (mass >= 0).all() or not mass.sum(1).all():
        raise CheckpointError(f"{path}: [{layers}, {experts}] masses wanted")
    mass = mass / mass.sum(1, keepdims=True)
    return tuple(tuple(round(float(v), 6) for v in row) for row in mass)


def _facts(checkpoint: Checkpoint, family: Family, store: BlobStore) -> BaseIndex:
    """The index without blobs of weights."""
    config = families.complete(checkpoint.config, str(checkpoint.path))
    try:
        base = outline.facts(config, family)
    except KeyError as error:
        raise CheckpointError(f"{checkpoint.path}/config.json: {error} is missing") from error
    return dataclasses.replace(
        base,
        base="",
        tokenizer=store.put(checkpoint.file("tokenizer.json")),
        routing_prior=_prior(checkpoint, len(base.moe_layers), base.num_experts),
    )


def _key(base: BaseIndex, checkpoint: Checkpoint, family: Family, dense: dict[str, Shape]) -> str:
    """Hash of all that decides the blobs: the weights, how they are cut and how they are packed."""
    paths = [
        path.format(layer=layer, expert="E")
        for layer in base.moe_layers
        for path in (
            *(family.fused.get(p, "") for p in family.projections),
            *(part for p in family.projections for part in family.split.get(p, ())),
            family.router,
            *family.router_extra.values(),
        )
    ]
    made = {name: value.tolist() for name, value in family.router_made(base.config).items()}
    facts = [SLICER, checkpoint.identity(), base.config, base.projections, paths, made, dense]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _blob(known: Sequence[Any]) -> Blob:
    """A blob as the journal has it."""
    return Blob(sha256=known[0], bytes=known[1])


@contextmanager
def _workers(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that share nothing but the machine: torch computes without the interpreter's lock."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _existing(store: BlobStore, formats: Sequence[str] | None) -> BaseIndex | None:
    """The base that the store holds already; its formats are those of the store."""
    path = store.root / "base.json"
    if not path.exists():
        return None
    base = read_base(path)
    if formats is not None and set(formats) != set(base.dense):
        raise ManifestError(
            f"{path}: formats {', '.join(base.dense)} found, {', '.join(formats)} wanted: choose a new --out"
        )
    return base


def slice_base(
    checkpoint: Checkpoint,
    family: Family,
    store: BlobStore,
    advance: Callable[[str], None],
    formats: Sequence[str] | None = None,
    jobs: int | None = None,
) -> BaseIndex:
    """Write all blobs of a checkpoint.

    Parameters
    ----------
    store : BlobStore
        When it holds a base, this must be the same one: nothing of another is written.
    advance : callable
        Told of each finished layer.
    formats : sequence of str, or None
        Of `packing.FORMATS`: every expert and the dense part are written in each of them. None: those that the store
        has, or FORMATS.
    jobs : int or None
        Threads; None: as many as there are cores.

    Raises
    ------
    CheckpointError
        A tensor is missing, of the wrong shape or not finite, or a width is no multiple of the group.
    ManifestError
        The store holds another base, or this one in other formats.
    """
    existing = _existing(store, formats)
    if existing is None:
        return _slice(checkpoint, family, store, advance, formats or FORMATS, jobs)
    closed = BlobStore(store.root, only={blob.sha256 for blob in existing.blobs()})
    other = f"{store.root}: holds the slices of another base, choose a new --out"
    try:
        base = _slice(checkpoint, family, closed, advance, tuple(existing.dense), jobs)
    except OtherBlob as error:
        raise ManifestError(other) from error
    if base.base != existing.base:
        raise ManifestError(other)
    return existing


def _slice(
    checkpoint: Checkpoint,
    family: Family,
    store: BlobStore,
    advance: Callable[[str], None],
    formats: Sequence[str],
    jobs: int | None,
) -> BaseIndex:
    checkpoint.rename(family.aliases)
    base = _facts(checkpoint, family, store)
    dense = dense_names(skeleton(base), base, family)
    path = store.root / "slicing.jsonl"
    with (
        closing(Journal(path, _key(base, checkpoint, family, dense))) as journal,
        _workers(jobs or os.cpu_count() or 1) as pool,
    ):

        def missing(item: str) -> list[str]:
            known = journal.get(item)
            return [f for f in formats if f not in known or _blob(known[f]) not in store]

        def expert(place: Place) -> dict[str, Any]:
            item = f"{place[0]}.{place[1]}"
            if wanted := missing(item):
                journal.add(item, _slice_expert(base, checkpoint, family, store, place, wanted))
            return journal.get(item)

        rows: dict[str, list[tuple[Blob, ...]]] = {format: [] for format in formats}
        squared, total = dict.fromkeys(formats, 0.0), 0.0
        frozen = base.moe_layers if base.projections != ("adapter",) else ()
        for layer in frozen:
            found = list(pool.map(expert, [(layer, e) for e in range(base.num_experts)]))
            total += sum(known["weight"] for known in found)
            for format in formats:
                rows[format].append(tuple(_blob(known[format]) for known in found))
                squared[format] += sum(known[format][2] for known in found)
            advance(f"layer {layer}")
        if wanted := missing("dense"):
            blobs = slice_dense(base, checkpoint, family, store, dense, wanted, pool)
            journal.add("dense", {f: [blob.sha256, blob.bytes] for f, blob in blobs.items()})
        advance("dense")
        if checkpoint.changed():
            journal.restart()
            raise CheckpointError(f"{checkpoint.path}: changed while it was read")
        base = dataclasses.replace(
            base,
            dense={format: _blob(journal.get("dense")[format]) for format in formats},
            experts={format: tuple(row) for format, row in rows.items()} if frozen else {},
        )
    # Errors are measured, in floating point, by whatever machine slices: they are no part of what the base is.
    named = dataclasses.replace(base, base=hashlib.sha256(to_json(base)).hexdigest())
    errors = {f: round((squared[f] / total) ** 0.5, 6) for f in formats} if total else {}
    return dataclasses.replace(named, error=errors)

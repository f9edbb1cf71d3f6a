"""Checkpoint -> base index: every expert quantised into blobs of its own, one per format; the rest into dense blobs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export import families
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint, CheckpointError
from export.families.family import Family
from export.train_graph import dense_names, skeleton
from protocol import PROTOCOL_VERSION, packing, tensors
from protocol.manifest import BaseIndex, Blob, to_json

FORMATS = ("int4", "int8")
"""Sliced unless asked otherwise: what the planner chooses from."""


@dataclasses.dataclass
class Error:
    """Squared error and squared weight of what was packed in one format."""

    squared: float = 0.0
    weight: float = 0.0

    def add(
        self, weight: NDArray[Any], packed: NDArray[Any], scale: NDArray[Any], format: str
    ) -> None:
        """Count one matrix [O, I]."""
        difference = (packing.dequantize(packed, scale, format) - weight).ravel()
        self.squared += float(difference @ difference)
        self.weight += float(weight.ravel() @ weight.ravel())

    @property
    def relative(self) -> float:
        """Root of mean squared error over root of mean squared weight."""
        return round((self.squared / self.weight) ** 0.5, 6) if self.weight else 0.0


def _read(
    checkpoint: Checkpoint, family: Family, projection: str, layer: int, expert: int
) -> NDArray[Any]:
    """One projection of one expert, [out, in] float32: from the layer's fused tensor or from the expert's own."""
    fused = family.fused.get(projection, "").format(layer=layer)
    if fused in checkpoint:
        return checkpoint.tensor(fused, expert).numpy()
    parts = [part.format(layer=layer, expert=expert) for part in family.split[projection]]
    if len(parts) == 1:
        return checkpoint.tensor(parts[0]).numpy()
    return torch.cat([checkpoint.tensor(part) for part in parts]).numpy()


def _prior(checkpoint: Checkpoint, layers: int, experts: int) -> tuple[tuple[float, ...], ...]:
    """Mean routing mass on the base's own text, or uniform where the checkpoint brings none."""
    path = checkpoint.path / "routing_prior.json"
    if not path.is_file():
        return ((1 / experts,) * experts,) * layers
    mass = np.asarray(json.loads(path.read_bytes())["layers"], dtype=np.float64)
    if mass.shape != (layers, experts) or not (mass >= 0).all() or not mass.sum(1).all():
        raise CheckpointError(f"{path}: [{layers}, {experts}] masses wanted")
    mass = mass / mass.sum(1, keepdims=True)
    return tuple(tuple(round(float(v), 6) for v in row) for row in mass)


def _expert(
    base: BaseIndex,
    checkpoint: Checkpoint,
    family: Family,
    store: BlobStore,
    layer: int,
    expert: int,
    errors: dict[str, Error],
) -> dict[str, Blob]:
    """format -> the blob of one expert."""
    where = f"{checkpoint.path}: expert {expert} in layer {layer}"
    named: dict[str, dict[str, NDArray[Any]]] = {format: {} for format in errors}
    for projection in base.projections:
        weight = _read(checkpoint, family, projection, layer, expert)
        if weight.shape != base.features(projection):
            raise CheckpointError(
                f"{checkpoint.path}: {projection} of expert {expert} in layer {layer} is "
                f"{list(weight.shape)}, {list(base.features(projection))} wanted"
            )
        for format, error in errors.items():
            try:
                packed, scale = packing.quantize(weight, format, base.group)
            except ValueError as problem:
                raise CheckpointError(f"{where}: {problem}") from problem
            error.add(weight, packed, scale, format)
            named[format][f"{projection}.packed"] = packed
            named[format][f"{projection}.scale"] = scale
    return {format: store.put(tensors.encode(parts)) for format, parts in named.items()}


def _dense(
    base: BaseIndex,
    checkpoint: Checkpoint,
    family: Family,
    store: BlobStore,
    formats: Sequence[str],
) -> dict[str, Blob]:
    """format -> the dense blob."""
    named: dict[str, dict[str, NDArray[Any]]] = {format: {} for format in formats}
    for name, shape in dense_names(skeleton(base), base, family).items():
        value = checkpoint.tensor(name).numpy()
        if value.shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is {list(value.shape)}, {list(shape)} wanted"
            )
        for format, parts in named.items():
            if not packing.packs(shape):
                parts[name] = value
                continue
            try:
                parts[f"{name}.packed"], parts[f"{name}.scale"] = packing.quantize(value, format)
            except ValueError as problem:
                raise CheckpointError(f"{checkpoint.path}: '{name}': {problem}") from problem
    for layer in base.moe_layers:
        if family.fresh_router is not None:
            for parts in named.values():
                parts[f"layers.{layer}.router"] = family.fresh_router(layer, base.config)
            continue
        # Routers stay exact: an adapter carries them whole, base rows and change.
        routers = {"router": family.router} | {
            f"router.{name}": path for name, path in family.router_extra.items()
        }
        values = {
            name: checkpoint.tensor(path.format(layer=layer)).numpy()
            for name, path in routers.items()
        }
        made = family.router_made(base.config)
        values |= {f"router.{name}": value.numpy() for name, value in made.items()}
        for parts in named.values():
            parts |= {f"layers.{layer}.{name}": value for name, value in values.items()}
    return {format: store.put(tensors.encode(parts)) for format, parts in named.items()}


def slice_base(
    checkpoint: Checkpoint,
    family: Family,
    store: BlobStore,
    advance: Callable[[str], None],
    formats: Sequence[str] = FORMATS,
) -> BaseIndex:
    """Write all blobs of a checkpoint.

    Parameters
    ----------
    advance : callable
        Told of each finished layer.
    formats : sequence of str
        Of `packing.FORMATS`: every expert and the dense part are written in each of them.

    Raises
    ------
    CheckpointError
        A tensor is missing or of the wrong shape, or a width is no multiple of the group.
    """
    config = families.complete(checkpoint.config, str(checkpoint.path))
    checkpoint.rename(family.aliases)
    layers, experts = family.moe_layers(config), family.num_experts(config)
    base = BaseIndex(
        protocol=PROTOCOL_VERSION,
        base="",
        model_type=family.model_type,
        config=config,
        moe_layers=layers,
        num_experts=experts,
        top_k=family.top_k(config),
        hidden=family.hidden(config),
        intermediate=family.intermediate(config),
        vocabulary=int(config["vocab_size"]),
        group=packing.GROUP,
        architecture=family.architecture,
        projections=family.projections,
        dense={},
        tokenizer=store.put(checkpoint.file("tokenizer.json")),
        experts={},
        error={},
        routing_prior=_prior(checkpoint, len(layers), experts),
        peft=family.peft,
    )
    errors = {format: Error() for format in formats}
    rows: dict[str, list[tuple[Blob, ...]]] = {format: [] for format in formats}
    if base.projections != ("adapter",):
        for layer in layers:
            blobs = [
                _expert(base, checkpoint, family, store, layer, expert, errors)
                for expert in range(experts)
            ]
            for format in formats:
                rows[format].append(tuple(blob[format] for blob in blobs))
            advance(f"layer {layer}")
        base = dataclasses.replace(
            base,
            experts={format: tuple(row) for format, row in rows.items()},
            error={format: error.relative for format, error in errors.items()},
        )
    base = dataclasses.replace(base, dense=_dense(base, checkpoint, family, store, formats))
    advance("dense")
    return dataclasses.replace(base, base=hashlib.sha256(to_json(base)).hexdigest())

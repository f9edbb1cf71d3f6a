"""Checkpoint -> base index: every expert quantised into a blob of its own, the rest into the dense blob."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.blob_store import BlobStore
from export.checkpoint import Checkpoint, CheckpointError
from export.families.family import Family
from export.train_graph import dense_names, skeleton
from protocol import PROTOCOL_VERSION, int4, tensors
from protocol.manifest import BaseIndex, Blob, to_json


def expert_blob(gate_up: NDArray[Any], down: NDArray[Any], group: int) -> bytes:
    """Quantise one expert: `gate_up` [2f, d], `down` [d, f] -> the bytes of its blob."""
    named = {}
    for name, weight in (("gate_up", gate_up), ("down", down)):
        named[f"{name}.packed"], named[f"{name}.scale"] = int4.quantize(weight, group)
    return tensors.encode(named)


def _projection(
    checkpoint: Checkpoint, family: Family, projection: str, layer: int
) -> Callable[[int], Any]:
    """expert -> its weight [out, in], from the fused tensor of the layer or from the expert's own."""
    fused = family.fused[projection].format(layer=layer)
    if fused in checkpoint:
        whole = checkpoint.tensor(fused)
        return lambda expert: whole[expert].numpy()
    parts = family.split[projection]
    return lambda expert: torch.cat(
        [checkpoint.tensor(part.format(layer=layer, expert=expert)) for part in parts]
    ).numpy()


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


def slice_base(
    checkpoint: Checkpoint, family: Family, store: BlobStore, advance: Callable[[str], None]
) -> BaseIndex:
    """Write all blobs of a checkpoint.

    Parameters
    ----------
    advance : callable
        Told of each finished layer.

    Raises
    ------
    CheckpointError
        A tensor is missing or of the wrong shape, or a width is no multiple of the int4 group.
    """
    config = checkpoint.config
    layers, experts = family.moe_layers(config), family.num_experts(config)
    tokenizer = store.put(checkpoint.file("tokenizer.json"))
    empty = Blob(sha256="0" * 64, bytes=0)
    base = BaseIndex(
        protocol=PROTOCOL_VERSION,
        base="",
        model_type=family.model_type,
        config=config,
        moe_layers=layers,
        num_experts=experts,
        top_k=family.top_k(config),
        hidden=int(config["hidden_size"]),
        intermediate=family.intermediate(config),
        vocabulary=int(config["vocab_size"]),
        group=int4.GROUP,
        dense=empty,
        tokenizer=tokenizer,
        experts=(),
        routing_prior=_prior(checkpoint, len(layers), experts),
        peft=family.peft,
    )
    rows = []
    for layer in layers:
        gate_up = _projection(checkpoint, family, "gate_up", layer)
        down = _projection(checkpoint, family, "down", layer)
        row = []
        for expert in range(experts):
            weights = gate_up(expert), down(expert)
            for weight, projection in zip(weights, ("gate_up", "down"), strict=True):
                if weight.shape != base.features(projection):
                    raise CheckpointError(
                        f"{checkpoint.path}: {projection} of expert {expert} in layer {layer} is "
                        f"{list(weight.shape)}, {list(base.features(projection))} wanted"
                    )
            try:
                row.append(store.put(expert_blob(*weights, base.group)))
            except ValueError as error:
                where = f"{checkpoint.path}: expert {expert} in layer {layer}"
                raise CheckpointError(f"{where}: {error}") from error
        rows.append(tuple(row))
        advance(f"layer {layer}")
    dense = {}
    for name, shape in dense_names(skeleton(base), base, family).items():
        value = checkpoint.tensor(name)
        if tuple(value.shape) != shape:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is {list(value.shape)}, {list(shape)} wanted"
            )
        dense[name] = value.to(torch.float16).numpy()
    for layer in layers:
        # Routers stay exact: an adapter carries them whole, base rows and change.
        router = checkpoint.tensor(family.router.format(layer=layer))
        dense[f"layers.{layer}.router"] = router.numpy()
    base = dataclasses.replace(base, experts=tuple(rows), dense=store.put(tensors.encode(dense)))
    advance("dense")
    return dataclasses.replace(base, base=hashlib.sha256(to_json(base)).hexdigest())

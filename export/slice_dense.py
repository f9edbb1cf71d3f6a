"""The dense blobs: everything of a checkpoint that is no expert, a matrix packed, the rest and the routers float32."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing

import numpy as np
import torch
from numpy.typing import NDArray

from export.blob_store import BlobStore
from export.checkpoint import Checkpoint, CheckpointError
from export.families.family import Family
from export.quantize import quantize
from export.tensor_file import TensorFile
from protocol import packing
from protocol.manifest import BaseIndex, Blob

PIECE = 1 << 24  # elements of a tensor that are in memory at a time, in each thread
Shape = tuple[int, ...]


def _routers(
    base: BaseIndex, checkpoint: Checkpoint, family: Family
) -> dict[str, NDArray[np.float32]]:
    """Routers and what belongs to them. They stay exact: an adapter carries them whole, base rows and change."""
    found = {}
    for layer in base.moe_layers:
        if family.fresh_router is not None:
            found[f"layers.{layer}.router"] = family.fresh_router(layer, base.config)
            continue
        paths = {"router": family.router}
        paths |= {f"router.{name}": path for name, path in family.router_extra.items()}
        for name, path in paths.items():
            value = checkpoint.tensor(path.format(layer=layer)).numpy()
            found[f"layers.{layer}.{name}"] = value
        for name, value in family.router_made(base.config).items():
            found[f"layers.{layer}.router.{name}"] = value.numpy()
    return found


def _specs(
    dense: Mapping[str, Shape], routers: Mapping[str, NDArray[np.float32]], format: str
) -> dict[str, tuple[Shape, str]]:
    """Name -> shape and dtype of what the blob of one format holds."""
    specs: dict[str, tuple[Shape, str]] = {n: (v.shape, "float32") for n, v in routers.items()}
    for name, shape in dense.items():
        if not packing.packs(shape):
            specs[name] = shape, "float32"
            continue
        rows, columns = shape
        row = packing.packed_bytes(format, 1, columns)
        specs[f"{name}.packed"] = (rows, row), "uint8"
        specs[f"{name}.scale"] = (rows, columns // packing.GROUP), "float16"
    return specs


def slice_dense(
    base: BaseIndex,
    checkpoint: Checkpoint,
    family: Family,
    store: BlobStore,
    dense: Mapping[str, Shape],
    formats: Sequence[str],
    pool: Executor,
) -> dict[str, Blob]:
    """Write the dense blobs.

    Parameters
    ----------
    dense : mapping of name -> shape
        The tensors wanted.
    formats : sequence of str
        One blob for each.

    Raises
    ------
    CheckpointError
        A tensor is missing, of another shape, or not finite.
    """
    for name, shape in dense.items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"{checkpoint.path}: '{name}' is {list(checkpoint.shape(name))}, {list(shape)} wanted"
            )
    routers = _routers(base, checkpoint, family)
    with ExitStack() as stack:
        files = {
            format: stack.enter_context(closing(TensorFile(store, _specs(dense, routers, format))))
            for format in formats
        }
        for file in files.values():
            for name, value in routers.items():
                file.write(name, value)
        pieces = [
            (name, start, min(start + step, count))
            for name, shape in dense.items()
            for count, step in [(shape[0] if shape else 1, _step(shape))]
            for start in range(0, count, step)
        ]

        def write(piece: tuple[str, int, int]) -> None:
            name, start, stop = piece
            value = checkpoint.raw(name, start, stop)
            try:
                if packing.packs(dense[name]):
                    for format, part in quantize(value, formats)[0].items():
                        files[format].write(f"{name}.packed", part.packed, start)
                        files[format].write(f"{name}.scale", part.scale, start)
                    return
                if not torch.isfinite(value).all():
                    raise ValueError("weight holds NaN or infinity")
            except ValueError as error:
                raise CheckpointError(f"{checkpoint.path}: '{name}': {error}") from error
            for file in files.values():
                file.write(name, value.float().numpy(), start)

        for _ in pool.map(write, pieces):
            pass
        return {format: file.finish() for format, file in files.items()}


def _step(shape: Shape) -> int:
    """Rows of a piece."""
    return max(1, PIECE // max(1, math.prod(shape[1:])))

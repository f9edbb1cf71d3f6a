"""Versions of the global adapter on disk: STATE/adapters/<version>/adapter.safetensors, memory-mapped when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import lora, names, tensors
from protocol.manifest import BaseIndex, Blob, Shape

_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "U8": np.uint8,
    "I64": np.int64,
    "F64": np.float64,
}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is whole or absent, and survives a crash once this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Open one of our own safetensors files without reading it: arrays are views of a read-only memory map."""
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    size = int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8 : 8 + size].tobytes())
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        piece = raw[start:end].view(np.dtype(_DTYPES[entry["dtype"]]))
        arrays[name] = np.asarray(piece).reshape(entry["shape"])
    return arrays


def fresh(base: BaseIndex, rank: int) -> dict[str, NDArray[np.float32]]:
    """Version 0: A as every device would draw it, B and the changes of router rows zero."""
    adapter: dict[str, NDArray[np.float32]] = {}
    for layer in base.moe_layers:
        for expert in range(base.num_experts):
            for projection in base.projections:
                out, into = base.features(projection)
                key = names.lora(layer, expert, projection, "lora_A")
                adapter[key] = lora.fresh_a(key, rank, into)
                key = names.lora(layer, expert, projection, "lora_B")
                adapter[key] = np.zeros((out, rank), np.float32)
            adapter[names.router_row(layer, expert)] = np.zeros(base.hidden, np.float32)
    return adapter


def write_version(
    folder: Path, version: int, adapter: Mapping[str, NDArray[np.float32]], extra: dict[str, bytes]
) -> Path:
    """Write `folder/<version>/` as a whole; `extra` are further files of it (the PEFT form).

    A version that is there already is replaced: it is the remains of a round that was not committed.
    """
    final, partial = folder / str(version), folder / f"{version}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in {"adapter.safetensors": tensors.encode(adapter), **extra}.items():
        write_atomically(partial / name, data)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    return final


def read_version(folder: Path, version: int) -> dict[str, NDArray[np.float32]]:
    """Memory-mapped adapter of a version."""
    return map_tensors(folder / str(version) / "adapter.safetensors")


def rank(folder: Path, version: int) -> int:
    """Rank of a version: the rows of its A factors."""
    adapter = read_version(folder, version)
    return max(int(a.shape[0]) for name, a in adapter.items() if name.endswith(".lora_A"))


def ranks(
    resident: Mapping[str, tuple[int, ...]], shape: Shape, base: BaseIndex
) -> dict[tuple[int, int], int]:
    """(layer, expert) -> rank of the slot it sits in, 0 where it is frozen; residents are in slot order.

    Raises
    ------
    ValueError
        More residents than slots: they were chosen for another shape.
    """
    found: dict[tuple[int, int], int] = {}
    for layer, slots in zip(base.moe_layers, shape.slots, strict=True):
        experts = resident.get(str(layer), ())
        if len(experts) > len(slots):
            raise ValueError(f"{len(experts)} experts in {len(slots)} slots of layer {layer}")
        found |= {(layer, e): slot.rank for e, slot in zip(experts, slots, strict=False)}
    return found


def part_for(
    adapter: Mapping[str, NDArray[np.float32]],
    rank_of: Mapping[tuple[int, int], int],
    base: BaseIndex,
) -> dict[str, NDArray[np.float32]]:
    """What a device needs of the adapter.

    Parameters
    ----------
    rank_of : (layer, expert) -> r, of every resident expert

    Returns
    -------
    The router row of each expert, the first r rows of its A and the first r columns of its B. After the SVD rule of
    `aggregate` these are its best factors of rank r.
    """
    part: dict[str, NDArray[np.float32]] = {}
    for (layer, expert), rank in rank_of.items():
        for projection in base.projections if rank else ():
            key = names.lora(layer, expert, projection, "lora_A")
            part[key] = adapter[key][:rank]
            key = names.lora(layer, expert, projection, "lora_B")
            part[key] = adapter[key][:, :rank]
        key = names.router_row(layer, expert)
        part[key] = adapter[key]
    return part


def slice_for(
    adapter: Mapping[str, NDArray[np.float32]],
    rank_of: Mapping[tuple[int, int], int],
    base: BaseIndex,
) -> bytes:
    """`part_for` as safetensors bytes."""
    return tensors.encode(part_for(adapter, rank_of, base))


def write_blob(folder: Path, data: bytes) -> Blob:
    """Store bytes under their hash."""
    blob = Blob(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    path = folder / blob.sha256
    if not path.exists():
        write_atomically(path, data)
    return blob

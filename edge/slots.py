"""Global names <-> slot arrays: the only place that knows which expert sits in which slot. Pure.

Letters: L MoE layers, E experts, P slots of a layer, R rank, d hidden, f expert width, G quantisation group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.session import FloatArrays, Resident
from protocol import names
from protocol.manifest import BaseIndex, Blob, Shape, TensorSpec

Arrays = Mapping[str, NDArray[Any]]


class SlotError(ValueError):
    """A selection, an adapter or a blob that does not fit the slots."""


def resident_of(
    held: Mapping[str, Sequence[int]], moe_layers: Sequence[int], slots: Sequence[int], experts: int
) -> Resident:
    """Check a lease's resident experts against the slots of the program.

    >>> resident_of({"0": [3, 1]}, (0,), (2,), 8)
    {0: (3, 1)}
    """
    unknown = set(held) - {str(layer) for layer in moe_layers}
    if unknown:
        raise SlotError(f"resident: layer {min(unknown)!r} is no MoE layer of the base")
    resident = {}
    for layer, room in zip(moe_layers, slots, strict=True):
        ids = tuple(held.get(str(layer), ()))
        if len(ids) != room or len(set(ids)) != room:
            raise SlotError(
                f"resident: {len(set(ids))} experts for layer {layer}, {room} slots to fill"
            )
        if min(ids) < 0 or max(ids) >= experts:
            raise SlotError(f"resident: expert {max(ids)} of layer {layer}, {experts} exist")
        resident[layer] = ids
    return resident


def trained_of(trained: Mapping[str, Sequence[int]], resident: Resident) -> Resident:
    """Check a lease's trained experts: a subset of the resident ones, in slot order.

    >>> trained_of({"0": [1]}, {0: (3, 1)})
    {0: (1,)}
    """
    for key, ids in trained.items():
        held = resident.get(int(key), ()) if key.isdecimal() else ()
        strangers = sorted(set(ids) - set(held))
        if strangers:
            raise SlotError(f"trained: expert {strangers[0]} of layer {key} is not resident")
    return {
        layer: tuple(e for e in held if e in set(trained.get(str(layer), ())))
        for layer, held in resident.items()
    }


def adapter_names(experts: Resident) -> list[str]:
    """Global names of everything that is trained for these experts."""
    return [
        name
        for layer, ids in experts.items()
        for expert in ids
        for name in (
            *(
                names.lora(layer, expert, projection, factor)
                for projection in names.PROJECTIONS
                for factor in names.FACTORS
            ),
            names.router_row(layer, expert),
        )
    ]


def parameter_shapes(base: BaseIndex, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the slot arrays that a training program holds."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, room in zip(base.moe_layers, shape.slots, strict=True):
        for projection in names.PROJECTIONS:
            out, features = base.features(projection)
            shapes[f"layers.{layer}.{projection}.a"] = (room, features, shape.rank)
            shapes[f"layers.{layer}.{projection}.b"] = (room, shape.rank, out)
        shapes[f"layers.{layer}.router"] = (room, base.hidden)
    return shapes


def slot_arrays(adapter: Arrays, resident: Resident, base: BaseIndex, shape: Shape) -> FloatArrays:
    """Global LoRA factors and router rows -> the arrays of a training program.

    Returns
    -------
    dict of str -> float32: `layers.l.{projection}.a` [P, in, R], `.b` [P, R, out] (transposes of `lora_A`, `lora_B`),
    `layers.l.router` [P, d]

    Raises
    ------
    SlotError
        Missing or unknown name, wrong shape or dtype, value not finite.
    """
    wanted = set(adapter_names(resident))
    if strange := set(adapter) ^ wanted:
        name = min(strange)
        raise SlotError(f"adapter: {name!r} is {'missing' if name in wanted else 'not resident'}")

    def read(name: str, want: tuple[int, ...]) -> NDArray[np.float32]:
        value = adapter[name]
        if value.shape != want or value.dtype != np.float32:
            raise SlotError(
                f"adapter: {name} is {value.dtype} {value.shape}, float32 {want} wanted"
            )
        if not np.isfinite(value).all():
            raise SlotError(f"adapter: {name} is not finite")
        return value

    arrays: FloatArrays = {}
    for layer, ids in resident.items():
        for projection in names.PROJECTIONS:
            out, features = base.features(projection)
            a = [
                read(names.lora(layer, e, projection, "lora_A"), (shape.rank, features))
                for e in ids
            ]
            b = [read(names.lora(layer, e, projection, "lora_B"), (out, shape.rank)) for e in ids]
            arrays[f"layers.{layer}.{projection}.a"] = np.stack([x.T for x in a])
            arrays[f"layers.{layer}.{projection}.b"] = np.stack([x.T for x in b])
        arrays[f"layers.{layer}.router"] = np.stack(
            [read(names.router_row(layer, e), (base.hidden,)) for e in ids]
        )
    return arrays


def global_tensors(arrays: Arrays, resident: Resident, trained: Resident) -> FloatArrays:
    """Inverse of `slot_arrays` for the trained experts: copies, ready to be sent."""
    tensors: FloatArrays = {}
    for layer, ids in trained.items():
        for expert in ids:
            slot = resident[layer].index(expert)
            for projection in names.PROJECTIONS:
                for factor, letter in (("lora_A", "a"), ("lora_B", "b")):
                    value = arrays[f"layers.{layer}.{projection}.{letter}"][slot].T
                    tensors[names.lora(layer, expert, projection, factor)] = value.copy()
            tensors[names.router_row(layer, expert)] = arrays[f"layers.{layer}.router"][slot].copy()
    return tensors


def frozen_slots(resident: Resident, trained: Resident) -> dict[int, list[int]]:
    """Slots whose expert is resident but not trained: their gradients are dropped.

    >>> frozen_slots({0: (3, 1)}, {0: (1,)})
    {0: [0]}
    """
    return {
        layer: [slot for slot, expert in enumerate(ids) if expert not in trained[layer]]
        for layer, ids in resident.items()
    }


def blobs_of(base: BaseIndex, resident: Resident) -> list[Blob]:
    """The expert blobs that these experts need."""
    position = {layer: i for i, layer in enumerate(base.moe_layers)}
    return [base.experts[position[layer]][e] for layer, ids in resident.items() for e in ids]


def expert_inputs(
    base: BaseIndex, resident: Resident, read: Callable[[Blob], Arrays]
) -> dict[str, NDArray[Any]]:
    """Stack the packed experts of each layer in slot order.

    Parameters
    ----------
    read : from a blob to its tensors `{projection}.packed` and `{projection}.scale`

    Returns
    -------
    `layers.l.{projection}.packed` uint8 [P * out, in / 2], `.scale` float32 [P * out, in / G]

    Raises
    ------
    SlotError
        A blob without these tensors, or of another shape.
    """
    position = {layer: i for i, layer in enumerate(base.moe_layers)}
    stacked: dict[str, NDArray[Any]] = {}
    for layer, ids in resident.items():
        for projection in names.PROJECTIONS:
            out, features = base.features(projection)
            packed = np.empty((len(ids) * out, features // 2), np.uint8)
            scale = np.empty((len(ids) * out, features // base.group), np.float32)
            for slot, expert in enumerate(ids):
                blob = base.experts[position[layer]][expert]
                tensors = read(blob)
                for part, into in (("packed", packed), ("scale", scale)):
                    value = tensors.get(f"{projection}.{part}")
                    room = into[slot * out : (slot + 1) * out]
                    if value is None or value.shape != room.shape:
                        found = "nothing" if value is None else value.shape
                        raise SlotError(
                            f"expert blob {blob.sha256[:12]} (layer {layer}, expert {expert}): "
                            f"{projection}.{part} is {found}, {room.shape} wanted"
                        )
                    room[...] = value
            stacked[f"layers.{layer}.{projection}.packed"] = packed
            stacked[f"layers.{layer}.{projection}.scale"] = scale
    return stacked


def router_inputs(dense: Arrays, resident: Resident) -> FloatArrays:
    """`layers.l.router_rows` [P, d], the base's own rows of the resident experts, and `layers.l.router_all` [E, d]."""
    arrays: FloatArrays = {}
    for layer, ids in resident.items():
        rows = dense.get(f"layers.{layer}.router")
        if rows is None:
            raise SlotError(f"dense blob: layers.{layer}.router is missing")
        full = np.asarray(rows, dtype=np.float32)
        arrays[f"layers.{layer}.router_all"] = full
        arrays[f"layers.{layer}.router_rows"] = full[list(ids)]
    return arrays


def resident_inputs(experts: int, resident: Resident) -> FloatArrays:
    """`layers.l.resident` [E]: 1 where the expert is there.

    >>> resident_inputs(3, {0: (2, 1)})["layers.0.resident"].tolist()
    [0.0, 1.0, 1.0]
    """
    arrays: FloatArrays = {}
    for layer, ids in resident.items():
        there = np.zeros(experts, np.float32)
        there[list(ids)] = 1
        arrays[f"layers.{layer}.resident"] = there
    return arrays


def with_deltas(
    router_all: NDArray[np.float32], delta: NDArray[np.float32], ids: Sequence[int]
) -> NDArray[np.float32]:
    """The full router [E, d] as this device knows it: the rows of its residents [P, d] moved by their deltas."""
    moved = router_all.copy()
    moved[list(ids)] += delta
    return moved


def check_inputs(
    inputs: Arrays, wanted: Sequence[TensorSpec], where: str
) -> dict[str, NDArray[Any]]:
    """The arrays a program asks for, in calling order; raises SlotError when one is missing or of another shape."""
    ordered: dict[str, NDArray[Any]] = {}
    for spec in wanted:
        value = inputs.get(spec.name)
        if value is None:
            raise SlotError(f"{where}: input {spec.name} is not known to this version")
        if value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
            raise SlotError(
                f"{where}: {spec.name} is {value.dtype} {value.shape}, {spec.dtype} {spec.shape} wanted"
            )
        ordered[spec.name] = value
    return ordered

"""Global names <-> the flat arrays of a program: the only place that knows which expert sits in which slot. Pure.

Letters: L MoE layers, E experts, P slots of a layer, R rank of a slot, d hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.session import FloatArrays, Resident
from protocol import names, packing
from protocol.manifest import BaseIndex, Blob, Shape, Slot, TensorSpec

Arrays = Mapping[str, NDArray[Any]]


class SlotError(ValueError):
    """A selection, an adapter or a blob that does not fit the slots."""


def resident_of(
    held: Mapping[str, Sequence[int]],
    moe_layers: Sequence[int],
    slots: Sequence[Sequence[Slot]],
    experts: int,
) -> Resident:
    """Check a lease's resident experts against the slots of the program; ids in slot order.

    >>> resident_of({"0": [3, 1]}, (0,), ((Slot(format="int4", rank=8),) * 2,), 8)
    {0: (3, 1)}
    """
    unknown = set(held) - {str(layer) for layer in moe_layers}
    if unknown:
        raise SlotError(f"resident: layer {min(unknown)!r} is no MoE layer of the base")
    resident = {}
    for layer, kinds in zip(moe_layers, slots, strict=True):
        ids, room = tuple(held.get(str(layer), ())), len(kinds)
        if len(ids) != room or len(set(ids)) != room:
            raise SlotError(
                f"resident: {len(set(ids))} experts for layer {layer}, {room} slots to fill"
            )
        if strangers := [e for e in ids if not 0 <= e < experts]:
            raise SlotError(f"resident: expert {strangers[0]} of layer {layer}, {experts} exist")
        resident[layer] = ids
    return resident


def trained_of(
    trained: Mapping[str, Sequence[int]], resident: Resident, slots: Sequence[Sequence[Slot]]
) -> Resident:
    """Check a lease's trained experts: residents of slots with a rank, in slot order.

    >>> kinds = ((Slot(format="int4", rank=8), Slot(format="int4", rank=0)),)
    >>> trained_of({"0": [3]}, {0: (3, 1)}, kinds)
    {0: (3,)}
    """
    able = {
        layer: {e for e, slot in zip(ids, kinds, strict=True) if slot.rank}
        for (layer, ids), kinds in zip(resident.items(), slots, strict=True)
    }
    for key, ids in trained.items():
        held = able.get(int(key), set()) if key.isdecimal() else set()
        if strangers := sorted(set(ids) - held):
            raise SlotError(
                f"trained: expert {strangers[0]} of layer {key} has no slot to train in"
            )
    return {
        layer: tuple(e for e in held if e in set(trained.get(str(layer), ())))
        for layer, held in resident.items()
    }


def adapter_shapes(base: BaseIndex, shape: Shape, resident: Resident) -> dict[str, tuple[int, ...]]:
    """Global name -> shape of every tensor of the resident experts' adapter.

    `lora_A` [R, in] and `lora_B` [out, R] with the rank of the expert's slot, none at rank 0; router rows [d].
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for (layer, ids), kinds in zip(resident.items(), shape.slots, strict=True):
        for expert, slot in zip(ids, kinds, strict=True):
            for projection in base.projections if slot.rank else ():
                out, features = base.features(projection)
                a, b = (names.lora(layer, expert, projection, factor) for factor in names.FACTORS)
                shapes[a], shapes[b] = (slot.rank, features), (out, slot.rank)
            shapes[names.router_row(layer, expert)] = (base.hidden,)
    return shapes


def names_of(experts: Resident, known: Mapping[str, object]) -> list[str]:
    """Those of the `known` global names that belong to these experts."""
    found = []
    for name in known:
        parsed = names.parse(name)
        if parsed is not None and parsed.expert in experts.get(parsed.layer, ()):
            found.append(name)
    return found


def views(arrays: Arrays, base: BaseIndex, shape: Shape, resident: Resident) -> FloatArrays:
    """Global names -> views into a program's flat arrays (parameters, or gradients under the same names)."""
    seen: FloatArrays = {}
    for (layer, ids), kinds in zip(resident.items(), shape.slots, strict=True):
        for projection in base.projections:
            for factor, letter in zip(names.FACTORS, "ab", strict=True):
                flat, at = arrays[f"layers.{layer}.{projection}.{letter}"], 0
                out, features = base.features(projection)
                for expert, slot in zip(ids, kinds, strict=True):
                    size = (slot.rank, features) if letter == "a" else (out, slot.rank)
                    if slot.rank:
                        name = names.lora(layer, expert, projection, factor)
                        seen[name] = flat[at : at + math.prod(size)].reshape(size)
                    at += math.prod(size)
        rows = arrays[f"layers.{layer}.router"]
        seen |= {names.router_row(layer, e): rows[slot] for slot, e in enumerate(ids)}
        seen[names.output_scale(layer)] = arrays[f"layers.{layer}.output_scale"]
    return seen


def fresh(specs: Sequence[TensorSpec]) -> FloatArrays:
    """A program's parameters that change nothing: zeros, and output scales of one."""
    return {
        s.name: np.full(s.shape, float(s.name.endswith(".output_scale")), np.float32) for s in specs
    }


def check_adapter(adapter: Arrays, wanted: Mapping[str, tuple[int, ...]]) -> FloatArrays:
    """The adapter as it came, once it is what the slots hold.

    Raises
    ------
    SlotError
        Missing or unknown name, wrong shape or dtype, value not finite.
    """
    if strange := set(adapter) ^ set(wanted):
        name = min(strange)
        raise SlotError(f"adapter: {name!r} is {'missing' if name in wanted else 'not resident'}")
    for name, size in wanted.items():
        value = adapter[name]
        if value.shape != size or value.dtype != np.float32:
            raise SlotError(
                f"adapter: {name} is {value.dtype} {value.shape}, float32 {size} wanted"
            )
        if not np.isfinite(value).all():
            raise SlotError(f"adapter: {name} is not finite")
    return dict(adapter)


def split_adapter(
    blob: Arrays, wanted: Mapping[str, tuple[int, ...]], base: BaseIndex
) -> tuple[FloatArrays, FloatArrays]:
    """(adapter, what else came with it) of a lease's blob, checked.

    Returns
    -------
    adapter : see `check_adapter`
    shared : `scaffold.<name>` in the shape of that name, `trained_counts` [L, E]; each may be missing

    Raises
    ------
    SlotError
    """
    beside = {names.SCAFFOLD + name: size for name, size in wanted.items()}
    beside["trained_counts"] = (len(base.moe_layers), base.num_experts)
    shared = {name: value for name, value in blob.items() if name in beside}
    check_adapter(shared, {name: beside[name] for name in shared})
    adapter = {name: value for name, value in blob.items() if name not in shared}
    return check_adapter(adapter, wanted), dict(shared)


def blobs_of(base: BaseIndex, shape: Shape, resident: Resident) -> list[Blob]:
    """The expert blobs that these experts need, each in the format of its slot."""
    position = {layer: i for i, layer in enumerate(base.moe_layers)}
    try:
        return [
            base.experts[slot.format][position[layer]][expert]
            for (layer, ids), kinds in zip(resident.items(), shape.slots, strict=True)
            for expert, slot in zip(ids, kinds, strict=True)
            if slot.format != "none"
        ]
    except KeyError as error:
        raise SlotError(f"the base has no experts in format {error}") from error


def expert_inputs(
    base: BaseIndex, shape: Shape, resident: Resident, read: Callable[[Blob], Arrays]
) -> dict[str, NDArray[Any]]:
    """Lay the packed experts of each layer one after the other, in slot order.

    Parameters
    ----------
    read : from a blob to its tensors `{projection}.packed` and `{projection}.scale`

    Returns
    -------
    `layers.l.{projection}.packed` uint8 [bytes], `.scale` float16 [groups]

    Raises
    ------
    SlotError
        A blob without these tensors, or of another shape.
    """
    blobs = iter(blobs_of(base, shape, resident))
    laid: dict[str, NDArray[Any]] = {}
    for (layer, ids), kinds in zip(resident.items(), shape.slots, strict=True):
        if all(slot.format == "none" for slot in kinds):
            continue
        into, at = {}, {}
        for projection in base.projections:
            out, features = base.features(projection)
            sizes = {
                "packed": sum(packing.packed_bytes(s.format, out, features) for s in kinds),
                "scale": len(kinds) * out * features // base.group,
            }
            for part, dtype in (("packed", np.uint8), ("scale", np.float16)):
                key = f"{projection}.{part}"
                into[key], at[key] = np.empty(sizes[part], dtype), 0
        for expert, slot in zip(ids, kinds, strict=True):
            blob = next(blobs)
            tensors = read(blob)
            for key, flat in into.items():
                projection, _, part = key.partition(".")
                out, features = base.features(projection)
                width = features * packing.BITS[slot.format] // 8
                want = (out, width if part == "packed" else features // base.group)
                value = tensors.get(key)
                if value is None or value.shape != want or value.dtype != flat.dtype:
                    found = "nothing" if value is None else f"{value.dtype} {value.shape}"
                    raise SlotError(
                        f"expert blob {blob.sha256[:12]} (layer {layer}, expert {expert}): "
                        f"{key} is {found}, {flat.dtype} {want} wanted"
                    )
                size = math.prod(want)
                flat[at[key] : at[key] + size] = value.reshape(-1)
                at[key] += size
        laid |= {f"layers.{layer}.{key}": flat for key, flat in into.items()}
    return laid


def router_inputs(dense: Arrays, resident: Resident) -> FloatArrays:
    """`layers.l.router_all` [E, d] and rows of the residents: `layers.l.router_rows` [P, d] and `.{extra}` [P, ...]."""
    arrays: FloatArrays = {}
    for layer, ids in resident.items():
        prefix = f"layers.{layer}.router"
        if prefix not in dense:
            raise SlotError(f"dense blob: {prefix} is missing")
        for name, value in dense.items():
            if name == prefix or name.startswith(f"{prefix}."):
                rows = np.asarray(value, dtype=np.float32)
                arrays[name.replace(prefix, f"layers.{layer}.router_rows", 1)] = rows[list(ids)]
        arrays[f"layers.{layer}.router_all"] = np.array(dense[prefix], dtype=np.float32)
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
        if value.size == math.prod(spec.shape) and spec.name.endswith((".packed", ".scale")):
            value = value.reshape(spec.shape)
        if value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
            raise SlotError(
                f"{where}: {spec.name} is {value.dtype} {value.shape}, {spec.dtype} {spec.shape} wanted"
            )
        ordered[spec.name] = value
    return ordered

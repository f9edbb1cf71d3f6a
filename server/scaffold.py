"""SCAFFOLD's control variates on the server (arXiv 1910.06378). Pure but for the two ends of a file.

Letters: L MoE layers, E experts, c the server's variate of a tensor, c_i a device's, n devices that hold an expert.

The paper's c is the mean of c_i over all devices. Here most devices never hold a given expert, and their c_i = 0 would
pull c towards zero: a lone holder's gradient g + c - c_i would vanish. So the mean is over those that have trained the
expert, and a set of them is kept for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol import names, tensors
from server import adapters

FILE = "scaffold.safetensors"
_SEEN = "seen."
Array = NDArray[np.float32]
Held = dict[tuple[int, int], frozenset[str]]


@dataclass(frozen=True, kw_only=True)
class Control:
    """c of every tensor that was ever trained, and (layer id, expert id) -> devices that have trained it."""

    variates: Mapping[str, Array] = field(default_factory=dict)
    holders: Mapping[tuple[int, int], frozenset[str]] = field(default_factory=dict)


NOTHING = Control()


def advance(
    control: Control,
    changes: Mapping[str, Mapping[str, Array]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Control:
    """Take in one round's changes of c_i.

    Parameters
    ----------
    changes : device -> global name -> c_i now less c_i before; of a slot of lower rank, the first rows or columns
    shapes : global name -> shape in the adapter

    Returns
    -------
    Control
        c is again the mean of c_i over the holders of its expert, newcomers counting from 0:
        (n c + sum of changes) / n of now.
        The result does not depend on the order of the devices.

    Examples
    --------
    >>> name = "layers.0.router.1"
    >>> one = advance(Control(), {"a": {name: np.float32([4.0])}}, {name: (1,)})
    >>> two = advance(one, {"b": {name: np.float32([2.0])}}, {name: (1,)})
    >>> one.variates[name].tolist(), two.variates[name].tolist()
    ([4.0], [3.0])
    """
    sums: dict[str, NDArray[np.float64]] = {}
    found: dict[tuple[int, int], set[str]] = {}
    for device in sorted(changes):
        for name, change in changes[device].items():
            parsed = names.parse(name)
            assert parsed is not None  # `accept` has let nothing else pass
            found.setdefault((parsed.layer, parsed.expert), set()).add(device)
            total = sums.setdefault(name, np.zeros(shapes[name]))
            total[tuple(slice(n) for n in change.shape)] += change
    holders = dict(control.holders)
    for key, devices in found.items():
        holders[key] = holders.get(key, frozenset()) | devices
    variates = dict(control.variates)
    for name, total in sums.items():
        parsed = names.parse(name)
        assert parsed is not None
        key = parsed.layer, parsed.expert
        before = len(control.holders.get(key, ()))
        if name in variates:
            total += before * variates[name].astype(np.float64)
        variates[name] = (total / len(holders[key])).astype(np.float32)
    return Control(variates=variates, holders=holders)


def part_for(
    control: Control, adapter_part: Mapping[str, NDArray[np.floating]]
) -> dict[str, Array]:
    """`scaffold.<name>` for a device's slice of the adapter, cut to the same rows and columns."""
    return {
        names.SCAFFOLD + name: control.variates[name][tuple(slice(n) for n in value.shape)]
        for name, value in adapter_part.items()
        if name in control.variates
    }


def to_bytes(control: Control) -> bytes:
    """One file with both; a device is a tensor of [holdings, 2] (layer, expert)."""
    held: dict[str, list[tuple[int, int]]] = {}
    for key, devices in sorted(control.holders.items()):
        for device in devices:
            held.setdefault(device, []).append(key)
    seen = {_SEEN + device: np.array(keys, np.int64) for device, keys in held.items()}
    return tensors.encode({**control.variates, **seen})


def read(folder: Path, version: int) -> Control:
    """The variates that belong to an adapter version; none when it has none. Memory-mapped."""
    path = folder / str(version) / FILE
    if not path.exists():
        return NOTHING
    found = adapters.map_tensors(path)
    holders: dict[tuple[int, int], set[str]] = {}
    for name in [n for n in found if n.startswith(_SEEN)]:
        for layer, expert in found.pop(name).tolist():
            holders.setdefault((layer, expert), set()).add(name[len(_SEEN) :])
    return Control(variates=found, holders={k: frozenset(v) for k, v in holders.items()})

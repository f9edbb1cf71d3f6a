"""`--experts FILE`: JSON with measured routing to choose by, or with the experts themselves.

{"mass": [[0.2, ...], ...], "utility": [[...], ...]}  [L, E] numbers >= 0
{"layers": {"0": [3, 7], ...}}                        the experts of every layer

Utility is what training an expert brings; without it, its mass counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export import items
from export.items import Values
from protocol.manifest import BaseIndex


class ExpertsError(ValueError):
    """Expert statistics, a selection or an option that does not fit the base. One line."""


def read(path: Path | None) -> dict[str, Any] | None:
    """The file's table; None without a file. Raises ExpertsError."""
    if path is None:
        return None
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ExpertsError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExpertsError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict) or not ({"layers", "mass"} & set(value)):
        raise ExpertsError(f'{path}: a table with "layers" or "mass" wanted')
    return value


def values(base: BaseIndex, experts: dict[str, Any] | None) -> Values:
    """What the planner chooses by; the base's prior where nothing is given. Raises ExpertsError."""
    if experts is None:
        return items.prior(base)
    if "layers" in experts:
        known = items.prior(base)
        return Values(known.mass, known.use, _selection(base, experts["layers"]))
    mass = _shares(base, experts["mass"], "mass")
    use = _shares(base, experts["utility"], "utility") if "utility" in experts else mass
    return Values(mass, use)


def _shares(base: BaseIndex, given: Any, name: str) -> NDArray[np.float64]:
    wanted = (len(base.moe_layers), base.num_experts)
    try:
        table = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ExpertsError(f"experts: {name} is no table of numbers") from error
    if table.shape != wanted or not (table >= 0).all() or not np.isfinite(table).all():
        raise ExpertsError(
            f"experts: {name} of shape {list(table.shape)} found, {list(wanted)} of numbers >= 0 wanted"
        )
    return table / np.maximum(table.sum(1, keepdims=True), 1e-12)


def _selection(base: BaseIndex, layers: Any) -> NDArray[np.bool_]:
    """An explicit selection, checked, as a mask [L, E]."""
    wanted = [str(layer) for layer in base.moe_layers]
    if not isinstance(layers, dict) or sorted(layers) != sorted(wanted):
        found = ", ".join(layers) if isinstance(layers, dict) else type(layers).__name__
        raise ExpertsError(f"experts: layers {found} found, {', '.join(wanted)} wanted")
    selected = np.zeros((len(wanted), base.num_experts), bool)
    for row, layer in zip(selected, wanted, strict=True):
        ids = layers[layer]
        good = isinstance(ids, list) and all(
            isinstance(e, int) and 0 <= e < base.num_experts for e in ids
        )
        if not good or len(set(ids)) != len(ids) or len(ids) < base.top_k:
            raise ExpertsError(
                f"experts: layer {layer}: at least {base.top_k} different ids "
                f"from 0 to {base.num_experts - 1} wanted"
            )
        row[ids] = True
    return selected

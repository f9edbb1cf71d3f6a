"""The end of a round: accepted updates on disk -> the next adapter, expert values and training counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol import names
from protocol.manifest import BaseIndex
from server import adapters, expert_values, fft_adapter, peft_adapter, scaffold
from server.aggregate import Aggregated, Contribution, aggregate
from server.artifacts import Artifacts
from server.expert_values import Floats


@dataclass(frozen=True, kw_only=True)
class Reported:
    """One accepted update: its file and the tokens behind its statistics."""

    path: Path
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What a round leaves behind; `aggregated` is None when nothing was trained."""

    aggregated: Aggregated | None
    values: dict[str, Floats]  # smoothed, of the devices that reported
    trained_counts: NDArray[np.int64]
    control: scaffold.Control = scaffold.NOTHING


def fold(
    updates: Mapping[str, Reported],
    *,
    base: BaseIndex,
    values: Mapping[str, Floats],
    trained_counts: NDArray[np.int64] | None,
    adapter: Mapping[str, NDArray[np.float32]],
    beta: float,
    rule: str,
    prior: float,
    control: scaffold.Control = scaffold.NOTHING,
) -> Folded:
    """Fold the updates of one round, memory-mapped, into `adapter` and into the expert values.

    Parameters
    ----------
    updates : device -> accepted update
    values, trained_counts, control : as they were before the round
    """
    counts = np.zeros((len(base.moe_layers), base.num_experts), np.int64)
    if trained_counts is not None:
        counts += trained_counts
    smoothed: dict[str, Floats] = {}
    contributions = []
    moved: dict[str, dict[str, NDArray[np.float32]]] = {}
    for device in sorted(updates):
        tensors = adapters.map_tensors(updates[device].path)
        tensors.pop("facts")
        stats = {k[6:]: tensors.pop(k) for k in list(tensors) if k.startswith("stats.")}
        if updates[device].tokens > 0:
            new = expert_values.values(stats, beta)
            smoothed[device] = expert_values.smooth(values.get(device), new)
        beside = [name for name in tensors if name.startswith(names.SCAFFOLD)]
        if beside:
            moved[device] = {n.removeprefix(names.SCAFFOLD): tensors.pop(n) for n in beside}
        tokens = stats["trained_tokens"]
        counts += tokens > 0
        weights = {
            (base.moe_layers[i], int(e)): float(tokens[i, e])
            for i, e in zip(*np.nonzero(tokens), strict=True)
        }
        contributions.append(Contribution(device=device, tensors=tensors, weights=weights))
    aggregated = None
    if any(c.weights for c in contributions):
        aggregated = aggregate(adapter, contributions, base.projections, rule=rule, prior=prior)
    if moved:
        control = scaffold.advance(control, moved, {n: v.shape for n, v in adapter.items()})
    return Folded(aggregated=aggregated, values=smoothed, trained_counts=counts, control=control)


def write_version(
    folder: Path,
    version: int,
    adapter: Mapping[str, NDArray[np.float32]],
    artifacts: Artifacts,
    base_name: str,
    control: scaffold.Control = scaffold.NOTHING,
) -> None:
    """Write `folder/<version>/`: our own form and PEFT's, or for adapter experts the form our loader reads."""
    base = artifacts.base
    name = base_name or f"{base.model_type}-{base.base[:12]}"
    routers = artifacts.routers()
    if base.peft is None:
        files = fft_adapter.fft_files(adapter, routers, base, version=version, base_name=name)
    else:
        extra = artifacts.router_extra()
        files = peft_adapter.peft_files(
            adapter, routers, base, version=version, base_name=name, extra=extra
        )
    if control.variates:
        files = {**files, scaffold.FILE: scaffold.to_bytes(control)}
    adapters.write_version(folder, version, adapter, files)

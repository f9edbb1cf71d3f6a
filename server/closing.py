"""The end of a round: accepted updates on disk -> the next adapter, expert values and training counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol import names
from protocol.manifest import BaseIndex
from server import (
    adapters,
    contribution,
    expert_values,
    fft_adapter,
    peft_adapter,
    scaffold,
    similarity,
)
from server.aggregate import Aggregated, aggregate
from server.artifacts import Artifacts
from server.expert_values import Floats
from server.rules import Rules


@dataclass(frozen=True, kw_only=True)
class Reported:
    """One accepted update: its file, the tokens behind its statistics, the device's training rows."""

    path: Path
    tokens: int
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What a round leaves behind; `aggregated` is None when nothing was trained."""

    aggregated: Aggregated | None
    values: dict[str, Floats]  # smoothed, of the devices that reported
    trained_counts: NDArray[np.int64]
    activations: dict[str, Floats]  # of the devices that reported
    control: scaffold.Control = scaffold.NOTHING


def fold(
    updates: Mapping[str, Reported],
    *,
    base: BaseIndex,
    values: Mapping[str, Floats],
    trained_counts: NDArray[np.int64] | None,
    adapter: Mapping[str, NDArray[np.float32]],
    beta: float,
    rules: Rules,
    routers: Mapping[int, NDArray[np.floating]] | None = None,
    control: scaffold.Control = scaffold.NOTHING,
) -> Folded:
    """Fold the updates of one round, memory-mapped, into `adapter` and into the expert values.

    Parameters
    ----------
    updates : device -> accepted update
    values, trained_counts, control : as they were before the round
    routers : layer -> router rows of the base, for the drift of the gates
    """
    counts = np.zeros((len(base.moe_layers), base.num_experts), np.int64)
    if trained_counts is not None:
        counts += trained_counts
    smoothed: dict[str, Floats] = {}
    activations: dict[str, Floats] = {}
    contributions = []
    moved: dict[str, dict[str, NDArray[np.float32]]] = {}
    for device in sorted(updates):
        tensors = adapters.map_tensors(updates[device].path)
        tensors.pop("facts")
        stats = {k[6:]: tensors.pop(k) for k in list(tensors) if k.startswith("stats.")}
        if updates[device].tokens > 0:
            new = expert_values.values(stats, beta)
            smoothed[device] = expert_values.smooth(values.get(device), new)
            activations[device] = similarity.activation(stats)
        beside = [name for name in tensors if name.startswith(names.SCAFFOLD)]
        if beside:
            moved[device] = {n.removeprefix(names.SCAFFOLD): tensors.pop(n) for n in beside}
        tokens = stats["trained_tokens"]
        counts += tokens > 0
        contributions.append(
            contribution.from_stats(
                device,
                tensors,
                stats,
                base.moe_layers,
                top_k=base.top_k,
                rows=updates[device].rows,
                blend=rules.gate_blend,
            )
        )
    aggregated = None
    if any(c.trained_tokens for c in contributions):
        aggregated = aggregate(adapter, contributions, base.projections, rules, routers=routers)
    if moved:
        control = scaffold.advance(control, moved, {n: v.shape for n, v in adapter.items()})
    return Folded(
        aggregated=aggregated,
        values=smoothed,
        trained_counts=counts,
        activations=activations,
        control=control,
    )


def expert_versions(
    former: NDArray[np.int64] | None,
    before: NDArray[np.int64] | None,
    after: NDArray[np.int64],
    version: int,
) -> NDArray[np.int64]:
    """Adapter version that last changed each expert, [L, E].

    Parameters
    ----------
    former : the same before the round; None before the first
    before, after : [L, E], training counts before and after it
    version : what the round made

    Examples
    --------
    >>> expert_versions(np.array([[1, 0]]), np.array([[1, 0]]), np.array([[1, 2]]), 2).tolist()
    [[1, 2]]
    """
    zero = np.zeros_like(after)
    trained = after > (zero if before is None else before)
    return np.where(trained, version, zero if former is None else former)


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

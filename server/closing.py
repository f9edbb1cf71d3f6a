"""The end of a round: accepted updates on disk -> the next adapter, expert values and training counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol.manifest import BaseIndex
from server import adapters, coverage, expert_values, fft_adapter, peft_adapter
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
    trained_mass: Floats


def fold(
    updates: Mapping[str, Reported],
    *,
    base: BaseIndex,
    values: Mapping[str, Floats],
    trained_counts: NDArray[np.int64] | None,
    trained_mass: Floats | None,
    adapter: Mapping[str, NDArray[np.float32]],
    beta: float,
    relevance: str,
    lam: float,
    decay: float,
    rule: str,
    prior: float,
) -> Folded:
    """Fold the updates of one round, memory-mapped, into `adapter` and into the expert values.

    Parameters
    ----------
    updates : device -> accepted update
    values, trained_counts, trained_mass : as they were before the round
    """
    counts = np.zeros((len(base.moe_layers), base.num_experts), np.int64)
    if trained_counts is not None:
        counts += trained_counts
    smoothed: dict[str, Floats] = {}
    contributions, trained = [], []
    for device in sorted(updates):
        tensors = adapters.map_tensors(updates[device].path)
        tensors.pop("facts")
        stats = {k[6:]: tensors.pop(k) for k in list(tensors) if k.startswith("stats.")}
        if updates[device].tokens > 0:
            new = expert_values.values(stats, beta, relevance, lam)
            smoothed[device] = expert_values.smooth(values.get(device), new)
        tokens = stats["trained_tokens"]
        counts += tokens > 0
        trained.append(tokens)
        weights = {
            (base.moe_layers[i], int(e)): float(tokens[i, e])
            for i, e in zip(*np.nonzero(tokens), strict=True)
        }
        contributions.append(Contribution(device=device, tensors=tensors, weights=weights))
    aggregated = None
    if any(c.weights for c in contributions):
        aggregated = aggregate(adapter, contributions, base.projections, rule=rule, prior=prior)
    mass = coverage.faded(
        np.zeros(counts.shape) if trained_mass is None else trained_mass, trained, decay
    )
    return Folded(aggregated=aggregated, values=smoothed, trained_counts=counts, trained_mass=mass)


def write_version(
    folder: Path,
    version: int,
    adapter: Mapping[str, NDArray[np.float32]],
    artifacts: Artifacts,
    base_name: str,
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
    adapters.write_version(folder, version, adapter, files)

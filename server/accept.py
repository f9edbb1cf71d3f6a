"""Check one update against the lease it answers, before it can touch any state. Pure.

Letters: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import names, update
from protocol.manifest import BaseIndex
from protocol.messages import Lease
from protocol.tensors import TensorError
from protocol.update import Facts

RankOf = Mapping[tuple[int, int], int]
MAX_RMS = 8.0  # root mean square of a factor or row; a fresh A has 1 / sqrt(3 * features)
SLACK = 1.001  # float32 sums over many tokens
HEADER = 512  # bytes of a safetensors header per tensor, at most


class UpdateRejected(ValueError):
    """An update that will never count; the text is the reason, one line."""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """A checked update."""

    tensors: dict[str, NDArray[np.float32]]
    stats: dict[str, NDArray[np.float32]]
    facts: Facts

    @property
    def trained_tokens(self) -> NDArray[np.float32]:
        """[L, E]."""
        return self.stats["trained_tokens"]


def expected_shapes(lease: Lease, rank_of: RankOf, base: BaseIndex) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every adapter tensor of an update for `lease`.

    Raises
    ------
    UpdateRejected
        An expert to train that is not resident, or in a frozen slot.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, experts in lease.trained.items():
        for expert in experts:
            if expert not in lease.resident.get(layer, ()):
                raise UpdateRejected(f"expert {expert} of layer {layer} is not among the resident")
            rank = rank_of.get((int(layer), expert), 0)
            if not rank:
                raise UpdateRejected(f"expert {expert} of layer {layer} is in a frozen slot")
            for projection in base.projections:
                out, into = base.features(projection)
                shapes[names.lora(int(layer), expert, projection, "lora_A")] = (rank, into)
                shapes[names.lora(int(layer), expert, projection, "lora_B")] = (out, rank)
            shapes[names.router_row(int(layer), expert)] = (base.hidden,)
    return shapes


def max_update_bytes(lease: Lease, rank_of: RankOf, base: BaseIndex) -> int:
    """The most bytes that an update for `lease` can need; raises UpdateRejected as `expected_shapes`."""
    shapes = expected_shapes(lease, rank_of, base)
    stats = len(update.STATS) * len(base.moe_layers) * base.num_experts
    floats = sum(int(np.prod(shape)) for shape in shapes.values()) + stats
    return 4 * floats + HEADER * (len(shapes) + len(update.STATS)) + (64 << 10)


def accept(
    data: bytes,
    lease: Lease,
    base: BaseIndex,
    *,
    rank_of: RankOf,
    tokens_per_step: int,
    version: int,
) -> Accepted:
    """Open and check an update.

    Parameters
    ----------
    data : bytes as uploaded
    lease : what the device was asked to do
    rank_of : (layer, expert) -> rank of the slot of each resident expert, see `adapters.ranks`
    tokens_per_step : batch rows times sequence of the device's program; bounds what it can have trained on
    version : adapter version of the open round; an update from another one is stale

    Raises
    ------
    UpdateRejected
        Unreadable, too large, stale, wrong names, shapes or types, NaN, impossible statistics, absurd norms.
    """
    if lease.base_version != version:
        raise UpdateRejected(f"stale: trained from version {lease.base_version}, now {version}")
    wanted = expected_shapes(lease, rank_of, base)
    try:
        tensors, stats, facts = update.unpack(data, max_update_bytes(lease, rank_of, base))
    except TensorError as error:
        raise UpdateRejected(str(error)) from error
    _check_tensors(tensors, wanted)
    layers, experts = len(base.moe_layers), base.num_experts
    _check_tensors(stats, {name: (layers, experts) for name in update.STATS})
    _check_stats(stats, facts, lease, base, lease.steps * tokens_per_step)
    for name in sorted(tensors):
        rms = float(np.sqrt(np.mean(np.square(tensors[name], dtype=np.float64))))
        if rms > MAX_RMS:
            raise UpdateRejected(f"{name}: root mean square {rms:.3g}, at most {MAX_RMS} wanted")
    if len(facts.missed_mass) != layers:
        raise UpdateRejected(f"missed mass of {len(facts.missed_mass)} layers, {layers} wanted")
    if facts.rows < 0 or facts.tokens < 0 or facts.steps < 0 or facts.held_back_rows < 0:
        raise UpdateRejected("negative count in the facts")
    return Accepted(tensors=tensors, stats=stats, facts=facts)


def _check_tensors(
    found: Mapping[str, NDArray[Any]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    extra, missing = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
    if extra:
        raise UpdateRejected(f"{len(extra)} tensors not asked for, first: {extra[0][:80]!r}")
    if missing:
        raise UpdateRejected(f"{len(missing)} tensors missing, first: {missing[0]}")
    for name in sorted(found):
        array = found[name]
        if array.dtype != np.float32:
            raise UpdateRejected(f"{name}: {array.dtype} found, float32 wanted")
        if array.shape != wanted[name]:
            raise UpdateRejected(f"{name}: shape {array.shape} found, {wanted[name]} wanted")
        if not np.isfinite(array).all():
            raise UpdateRejected(f"{name}: NaN or infinity")


def _check_stats(
    stats: Mapping[str, NDArray[np.float32]],
    facts: Facts,
    lease: Lease,
    base: BaseIndex,
    most: int,
) -> None:
    for name in ("mass", "top", "output_norm", "trained_tokens", "peak", "high", "taylor"):
        if (stats[name] < 0).any():
            raise UpdateRejected(f"stats.{name}: negative")
    if (stats["peak"] > SLACK).any():
        raise UpdateRejected("stats.peak: a probability above 1")
    if (stats["high"] > stats["peak"] * SLACK).any():
        raise UpdateRejected("stats.high: above stats.peak")
    # The experts' shares sum to I(E; Y), which is at most the entropy of the experts. A correction may go below 0.
    if (stats["label_information"] > SLACK * np.log(base.num_experts) + 1e-6).any():
        raise UpdateRejected("stats.label_information: more than the experts can tell")
    if (stats["g_log_g"] > 1e-3).any():
        raise UpdateRejected("stats.g_log_g: positive")
    if (stats["mass"].sum(-1) > facts.tokens * SLACK + 1).any():
        raise UpdateRejected(f"stats.mass: more than the {facts.tokens} tokens of the facts")
    if (stats["trained_tokens"] > most).any():
        raise UpdateRejected(f"stats.trained_tokens: more than the {most} tokens of the lease")
    trained = np.zeros((len(base.moe_layers), base.num_experts), bool)
    for layer, experts in lease.trained.items():
        trained[base.moe_layers.index(int(layer)), list(experts)] = True
    if (stats["trained_tokens"][~trained] > 0).any():
        raise UpdateRejected("stats.trained_tokens: tokens for an expert that was not trained")
    resident = np.zeros_like(trained)
    for layer, experts in lease.resident.items():
        resident[base.moe_layers.index(int(layer)), list(experts)] = True
    if (stats["taylor"][~resident] > 0).any():
        raise UpdateRejected("stats.taylor: of an expert that was not resident")

"""Check one update against the lease it answers, before it can touch any state. Pure.

Letters: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from protocol import names, tensors, update, uplink
from protocol.manifest import BaseIndex
from protocol.messages import Lease
from protocol.names import Factor
from protocol.objective import Objective
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


def factors_sent(objective: Objective) -> tuple[Factor, ...]:
    """LoRA factors of an update under this objective.

    >>> factors_sent(Objective(factors="lora_B")), factors_sent(Objective(personal=True))
    (('lora_B',), ('lora_A',))
    """
    if objective.personal:
        return ("lora_A",)
    return names.FACTORS if objective.factors == "both" else (objective.factors,)


def expected_shapes(lease: Lease, rank_of: RankOf, base: BaseIndex) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an update for `lease` but its statistics.

    What the lease's objective sends of the trained experts, and with SCAFFOLD `scaffold.<name>` for each.

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
                whole = {"lora_A": (rank, into), "lora_B": (out, rank)}
                for factor in factors_sent(lease.objective):
                    shapes[names.lora(int(layer), expert, projection, factor)] = whole[factor]
            shapes[names.router_row(int(layer), expert)] = (base.hidden,)
    shapes = {name: shape for name, shape in shapes.items() if lease.objective.sends(name)}
    if lease.objective.scaffold:
        shapes |= {names.SCAFFOLD + name: shape for name, shape in shapes.items()}
    return shapes


def max_update_bytes(lease: Lease, rank_of: RankOf, base: BaseIndex) -> int:
    """The most bytes that an update for `lease` can need; raises UpdateRejected as `expected_shapes`."""
    shapes = expected_shapes(lease, rank_of, base)
    stats = len(update.STATS) * len(base.moe_layers) * base.num_experts
    beside = 4 * stats + HEADER * len(update.STATS) + (64 << 10)
    if lease.uplink != "float32" and shapes:
        return beside + uplink.coded_bytes(shapes, lease.uplink) + HEADER * 2
    floats = sum(int(np.prod(shape)) for shape in shapes.values())
    return beside + 4 * floats + HEADER * len(shapes)


def accept(
    data: bytes,
    lease: Lease,
    base: BaseIndex,
    *,
    rank_of: RankOf,
    tokens_per_step: int,
    version: int,
    leased: Mapping[str, NDArray[Any]] | None = None,
) -> Accepted:
    """Open and check an update.

    Parameters
    ----------
    data : bytes as uploaded
    lease : what the device was asked to do
    rank_of : (layer, expert) -> rank of the slot of each resident expert, see `adapters.ranks`
    tokens_per_step : batch rows times sequence of the device's program; bounds what it can have trained on
    version : adapter version of the open round; an update from another one is stale
    leased : the device's slice of that version in float32, see `adapters.part_for`; needed where the lease codes the
        update, or rounds the adapter on its way down

    Returns
    -------
    Accepted
        Its tensors are values again, whatever the coding, and the change against the server's own float32 adapter is
        the device's change, whatever the rounding of the downlink.

    Raises
    ------
    UpdateRejected
        Unreadable, too large, stale, wrong names, shapes or types, NaN, impossible statistics, absurd norms.
    """
    if lease.base_version != version:
        raise UpdateRejected(f"stale: trained from version {lease.base_version}, now {version}")
    wanted = expected_shapes(lease, rank_of, base)
    try:
        found, stats, facts = update.unpack(data, max_update_bytes(lease, rank_of, base))
        values = arrived(found, wanted, leased, lease.uplink, lease.downlink)
    except TensorError as error:
        raise UpdateRejected(str(error)) from error
    layers, experts = len(base.moe_layers), base.num_experts
    _check_tensors(stats, {name: (layers, experts) for name in update.STATS})
    _check_stats(stats, facts, lease, base, lease.steps * tokens_per_step)
    for name in sorted(values):
        rms = float(np.sqrt(np.mean(np.square(values[name], dtype=np.float64))))
        if rms > MAX_RMS:
            raise UpdateRejected(f"{name}: root mean square {rms:.3g}, at most {MAX_RMS} wanted")
    if len(facts.missed_mass) != layers:
        raise UpdateRejected(f"missed mass of {len(facts.missed_mass)} layers, {layers} wanted")
    if facts.rows < 0 or facts.tokens < 0 or facts.steps < 0 or facts.held_back_rows < 0:
        raise UpdateRejected("negative count in the facts")
    return Accepted(tensors=values, stats=stats, facts=facts)


def arrived(
    found: Mapping[str, NDArray[Any]],
    wanted: Mapping[str, tuple[int, ...]],
    leased: Mapping[str, NDArray[Any]] | None,
    coding: Literal["float32", "int8", "int4"],
    downlink: Literal["float32", "float16"],
) -> dict[str, NDArray[np.float32]]:
    """Tensors of an update, checked, as values in terms of the server's own float32 adapter.

    Parameters
    ----------
    found : as they came, without statistics and facts
    wanted : global name -> shape, see `expected_shapes`
    leased, coding, downlink : see `accept`, `Lease.uplink`, `Lease.downlink`

    Raises
    ------
    UpdateRejected
        Wrong names, shapes or types, NaN.
    TensorError
        A coding that cannot be undone.
    """
    if coding == "float32" or not wanted:
        _check_tensors(found, wanted)
        moved = dict(found)
        if downlink == "float16":
            assert leased is not None
            rounded = tensors.widened(
                tensors.narrowed({n: leased[n] for n in leased if n in wanted})
            )
            moved |= {name: moved[name] - rounded[name] + leased[name] for name in rounded}
        return moved
    assert leased is not None
    change = uplink.decode(found, wanted, coding)
    moved = {name: leased[name] + c if name in leased else c for name, c in change.items()}
    _check_tensors(moved, wanted)
    return moved


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

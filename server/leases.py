"""Who trains which experts in the round that opens: device facts -> leases and their adapter slices on disk."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from protocol import tensors
from protocol.manifest import BaseIndex, Blob, Shape
from protocol.messages import Lease
from protocol.objective import Objective
from server import adapters, device_objective, expert_values, scaffold, training_set
from server.choose_experts import Chosen
from server.expert_values import Floats
from server.rounds import OpenRound
from server.strategies import STRATEGIES, Fleet
from server.structure import Held


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What every lease of a run has in common, and how experts are chosen."""

    run: str
    steps: int
    learning_rate: float
    router_learning_rate: float
    deadline: float
    seed: int
    exploration: float
    coverage: float
    strategy: str
    uplink_bytes: int
    gate_warmup: int = 0  # first rounds in which router rows do not learn
    objective: Objective = Objective()
    active_below: float = 0.0
    cap_share: float = 0.0
    uplink: Literal["float32", "int8", "int4"] = "float32"
    downlink: Literal["float32", "float16"] = "float32"
    profile: Literal["resident", "full"] = "resident"
    profile_rows: int = 0
    profile_clip: float = 0.0
    profile_noise: float = 0.0


def lease_id(run: str, round: int, device: str, attempt: int) -> str:
    """Id of a lease: also a file name and a topic level, so at most 64 characters.

    >>> lease_id("ab12", 3, "pixel-1", 1)
    'ab12-3-pixel-1-1'
    >>> len(lease_id("0123abcd", 99999, "x" * 64, 1)) <= 64
    True
    """
    if len(device) > 36:
        device = f"{device[:24]}-{hashlib.sha256(device.encode()).hexdigest()[:11]}"
    return f"{run}-{round}-{device}-{attempt}"


def select(
    command: OpenRound,
    shapes: Mapping[str, Shape],
    known: Mapping[str, Floats],
    trained_counts: NDArray[np.int64] | None,
    trained_mass: Floats | None,
    former: Mapping[str, Chosen],
    base: BaseIndex,
    terms: Terms,
) -> dict[str, Chosen]:
    """Experts per device and layer; the base's own routing stands in for a device without statistics.

    Parameters
    ----------
    shapes : of the whole fleet, not of the round's devices alone: coverage counts the holders of an expert, and who is
        not drawn today holds its experts still
    trained_mass : [L, E], see `coverage.faded`
    former : device -> what it holds now, see `holdings`; for "evaluate", of those that have trained
    """
    prior = np.asarray(base.routing_prior, np.float64)
    value = {device: known.get(device, prior) for device in shapes}
    if trained_counts is not None and command.work == "train":
        bonus = expert_values.exploration_bonus(trained_counts, command.round, terms.exploration)
        value = {device: v + bonus for device, v in value.items()}
    fleet = Fleet(
        value=value,
        slots={device: shape.slots for device, shape in shapes.items()},
        top_k=base.top_k,
        # Who never trained is measured with what is best for itself.
        coverage=0.0 if command.work == "evaluate" else terms.coverage,
        seed=terms.seed,
        former=former,
        prior=prior,
        past=trained_mass,
    )
    chosen = STRATEGIES[terms.strategy](fleet)
    if command.work == "evaluate":
        # The last round only measures: what a device trained stays, and nothing is fetched for it.
        chosen |= {d: held for d, held in former.items() if d in shapes and _fill(shapes[d], held)}
    return chosen


def _fill(shape: Shape, held: Chosen) -> bool:
    """Whether experts held fill a program's slots; the device may have got another program since."""
    return [len(ids) for ids in held] == [len(slots) for slots in shape.slots]


def holdings(former: Mapping[str, Lease], base: BaseIndex) -> dict[str, Chosen]:
    """What the devices hold by their last leases, in slot order."""
    return {
        device: [list(lease.resident.get(str(layer), ())) for layer in base.moe_layers]
        for device, lease in former.items()
    }


def write_leases(
    command: OpenRound,
    chosen: Mapping[str, Chosen],
    shapes: Mapping[str, Shape],
    known: Mapping[str, Floats],
    *,
    base: BaseIndex,
    terms: Terms,
    version: int,
    adapter_folder: Path,
    blob_folder: Path,
    held: Mapping[str, Held] | None = None,
    trained_counts: NDArray[np.int64] | None = None,
) -> dict[str, Lease]:
    """Make the leases of a round; slices of adapter `version` are written to `blob_folder`.

    Parameters
    ----------
    held : device -> its sub-model; such a device trains nothing else, others train all that can be
    trained_counts : [L, E] accepted updates that trained each expert; sent where the objective's balance wants it
    """
    adapter = adapters.read_version(adapter_folder, version)
    train = command.work == "train"
    control = (
        scaffold.read(adapter_folder, version) if terms.objective.scaffold else scaffold.NOTHING
    )
    warm = command.round > terms.gate_warmup
    prior = np.asarray(base.routing_prior, np.float64)
    shared = _Shared(adapter, base, terms, version, blob_folder)
    leases: dict[str, Lease] = {}
    for device, experts in chosen.items():
        resident = {str(layer): tuple(experts[i]) for i, layer in enumerate(base.moe_layers)}
        rank_of = adapters.ranks(resident, shapes[device], base)
        able = {
            layer: tuple(e for e in ids if rank_of[int(layer), e])
            for layer, ids in resident.items()
        }
        if held is not None and device in held:
            mine = dict(zip(map(str, base.moe_layers), held[device], strict=True))
            able = {k: tuple(e for e in ids if e in mine[k]) for k, ids in able.items()}
        trained = training_set.within_uplink(
            able, known.get(device, prior), rank_of, base, terms.uplink_bytes
        )
        part = adapters.part_for(adapter, rank_of, base)
        if train:
            part |= scaffold.part_for(control, part)
            if terms.objective.target_balance and trained_counts is not None:
                part["trained_counts"] = trained_counts.astype(np.float32)
        seed = np.random.SeedSequence([terms.seed, command.round, *device.encode()])
        leases[device] = Lease(
            lease=lease_id(terms.run, command.round, device, 1),
            run=terms.run,
            round=command.round,
            attempt=1,
            work=command.work,
            base_version=version,
            resident=resident,
            trained=trained if train else {},
            adapter=write_slice(blob_folder, part, terms.downlink),
            steps=terms.steps if train else 0,
            learning_rate=terms.learning_rate,
            router_learning_rate=terms.router_learning_rate if warm else 0.0,
            seed=int(seed.generate_state(1)[0]),
            objective=device_objective.fitted(
                terms.objective,
                shapes[device].slots,
                experts=base.num_experts,
                top_k=base.top_k,
                active_below=terms.active_below,
                cap_share=terms.cap_share,
            ),
            uplink=terms.uplink,
            downlink=terms.downlink,
            seconds=terms.deadline,
            nonce=secrets.token_hex(8),
            **(shared.profile(shapes[device]) if command.work == "profile" else {}),
        )
    return leases


def write_slice(
    folder: Path,
    part: Mapping[str, NDArray[np.float32]],
    downlink: Literal["float32", "float16"],
) -> Blob:
    """Store a device's slice under its hash, in the type of its downlink."""
    return adapters.write_blob(
        folder, tensors.encode(tensors.narrowed(part) if downlink == "float16" else part)
    )


class _Shared:
    """What the leases of a profiling round say beside the usual. The adapter of all experts is written once a rank."""

    def __init__(
        self,
        adapter: Mapping[str, NDArray[np.float32]],
        base: BaseIndex,
        terms: Terms,
        version: int,
        blob_folder: Path,
    ) -> None:
        self.adapter, self.base, self.terms = adapter, base, terms
        self.version, self.folder = version, blob_folder
        self.written: dict[int, Blob] = {}

    def profile(self, shape: Shape) -> dict[str, Any]:
        """Fields of a lease; nothing where devices measure what they hold."""
        terms = self.terms
        if terms.profile == "resident":
            return {}
        rank = max(slot.rank for layer in shape.slots for slot in layer)
        if self.version and rank not in self.written:
            every = [(la, e) for la in self.base.moe_layers for e in range(self.base.num_experts)]
            part = adapters.slice_for(self.adapter, dict.fromkeys(every, rank), self.base)
            self.written[rank] = adapters.write_blob(self.folder, part)
        return {
            "profile": "full",
            "profile_rows": terms.profile_rows,
            "profile_clip": terms.profile_clip,
            "profile_noise": terms.profile_noise,
            # Version 0 changes nothing: the base as it is.
            "profile_adapter": self.written.get(rank),
        }

"""What people and reports read: the line per closed round and the status of the run. Pure."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import schema
from protocol.manifest import BaseIndex, Shape, Slot
from protocol.messages import Lease
from server.aggregate import Aggregated
from server.rounds import State, work_of
from server.store import Device, LeaseRow
from server.structure import Change
from server.structure import State as Structure


def coverage(leases: Mapping[str, LeaseRow], base: BaseIndex) -> list[list[int]]:
    """Holders per expert, [L][E]."""
    counts = [[0] * base.num_experts for _ in base.moe_layers]
    for row in leases.values():
        for position, layer in enumerate(base.moe_layers):
            for expert in row.lease.resident.get(str(layer), ()):
                counts[position][expert] += 1
    return counts


def history_line(
    *,
    round: int,
    work: str,
    version: int,
    seconds: float,
    closed_by: str,
    leases: Mapping[str, LeaseRow],
    devices: Mapping[str, Device],
    rejected: Sequence[Mapping[str, str]],
    aggregated: Aggregated | None,
    base: BaseIndex,
    changes: Mapping[str, Change] | None = None,
) -> dict[str, Any]:
    """One line of history.jsonl; `version` is the adapter's version after the round."""
    done = {
        device: {
            "profile": devices[device].profile,
            "resident": row.lease.resident,
            "trained": row.lease.trained,
            "lease": row.lease.lease,
            "attempt": row.lease.attempt,
            "bytes_up": row.bytes,
            "weight": row.weight,
            **schema.to_dict(row.facts),
        }
        for device, row in leases.items()
        if row.state == "accepted"
    }
    tail = {"mean": 0.0, "max": 0.0}
    if aggregated is not None:
        tail = {"mean": aggregated.tail_mean, "max": aggregated.tail_max}
    return {
        "round": round,
        "work": work,
        "version": version,
        "seconds": round_to(seconds),
        "closed_by": closed_by,
        "coverage": coverage(leases, base),
        "prior_mass": 0.0 if aggregated is None else aggregated.prior_mass,
        "devices": done,
        "missing": [d for d, row in leases.items() if row.state == "open"],
        "rejected": list(rejected),
        "tail_energy": tail,
        "aggregation": {} if aggregated is None else diagnostics(aggregated),
        "structure": {
            device: schema.to_dict(change)
            for device, change in (changes or {}).items()
            if change.kind != "none"
        },
    }


def diagnostics(aggregated: Aggregated) -> dict[str, Any]:
    """What the history keeps of how updates fitted together."""
    bias = list(aggregated.bias.values())
    return {
        "factor_bias": {
            "mean": sum(bias) / len(bias) if bias else 0.0,
            "max": max(bias, default=0.0),
        },
        "gate_drift": aggregated.gate_drift,
        "routing_consistency": aggregated.consistency,
        "gate_alpha": aggregated.alpha,
    }


def expert_map(
    *,
    run: str,
    version: int,
    versions: NDArray[np.int64] | None,
    leases: Mapping[str, Lease],
    structures: Mapping[str, Structure],
    base: BaseIndex,
) -> dict[str, Any]:
    """GET /v1/experts: which device holds which experts, and how old they are.

    Parameters
    ----------
    versions : [L, E], adapter version that last changed each expert; None before the first
    leases : each device's latest; what it holds is of that lease's version
    structures : device -> its sub-model, of the devices that have one

    Returns
    -------
    "versions": layer -> [E]. "devices": device -> "version" of what it holds, "resident", "trained", "stale" (layer ->
    experts held that have changed since) and "structure" (None without one).
    """
    shape = (len(base.moe_layers), base.num_experts)
    changed = np.zeros(shape, np.int64) if versions is None else versions
    rows = {str(layer): changed[i] for i, layer in enumerate(base.moe_layers)}
    devices = {
        device: {
            "round": lease.round,
            "version": lease.base_version,
            "resident": lease.resident,
            "trained": lease.trained,
            "stale": {
                layer: [e for e in held if rows[layer][e] > lease.base_version]
                for layer, held in lease.resident.items()
            },
            "structure": schema.to_dict(structures[device]) if device in structures else None,
        }
        for device, lease in sorted(leases.items())
    }
    return {
        "run": run,
        "version": version,
        "versions": {layer: row.tolist() for layer, row in rows.items()},
        "devices": devices,
    }


def slot_kinds(slots: Sequence[Slot]) -> dict[str, int]:
    """How many slots of each kind a layer has, the kind as "format/rank".

    >>> slot_kinds([Slot(format="int8", rank=8), Slot(format="int4", rank=0)])
    {'int8/8': 1, 'int4/0': 1}
    """
    return dict(collections.Counter(f"{slot.format}/{slot.rank}" for slot in slots))


def round_to(seconds: float) -> float:
    """Milliseconds are enough."""
    return float(f"{seconds:.3f}")


def _measured(before: float, after: float) -> float | None:
    value = after if after >= 0 else before
    return value if value >= 0 else None


def _device_state(device: str, state: State, uploading: bool) -> str:
    if device not in state.online:
        return "offline"
    if state.phase == "over":
        return "over"
    if uploading:
        return "uploading"
    if device in state.pending and state.phase == "open":
        return "working"
    if device in state.leased:
        return "delivered" if device in state.accepted else "rejected"
    return "idle" if device in state.idle else "online"


def run_status(
    *,
    run: str,
    version: int,
    state: State,
    devices: Mapping[str, Device],
    shapes: Mapping[str, Shape],
    leases: Mapping[str, LeaseRow],
    accepted: Sequence[LeaseRow],
    uploading: frozenset[str],
    rejected: Sequence[Mapping[str, str]],
) -> dict[str, Any]:
    """GET /v1/run.

    Parameters
    ----------
    leases : the current round's
    accepted : of all rounds, oldest first
    """
    work = work_of(state.round, state.plan)
    named = {"profile": "profiling", "train": "training", "evaluate": "evaluating"}
    phase = "over" if state.phase == "over" else named[work]
    if state.phase == "waiting" and state.round == state.plan.first:
        phase = "waiting"
    views: dict[str, dict[str, Any]] = {}
    for name, device in devices.items():
        rows = [r for r in accepted if r.device == name]
        facts = [r.facts for r in rows if r.facts is not None]
        last = facts[-1] if facts else None
        current = leases.get(name)
        latest = current or (rows[-1] if rows else None)
        first = facts[0] if facts else None
        views[name] = {
            "profile": device.profile,
            "online": name in state.online,
            "state": _device_state(name, state, name in uploading),
            "lease": current.lease.lease if current and current.state == "open" else None,
            "work": current.lease.work if current else None,
            "last_seen": device.last_seen,
            "slots": [slot_kinds(layer) for layer in shapes[name].slots] if name in shapes else [],
            "resident": latest.lease.resident if latest else {},
            "trained": latest.lease.trained if latest else {},
            "budget_bytes": last.budget_bytes if last else None,
            "peak_bytes": max(f.peak_bytes for f in facts) if facts else None,
            "baseline_bytes": last.baseline_bytes if last else None,
            "bytes_up": sum(r.bytes for r in rows),
            "bytes_down": sum(f.bytes_down for f in facts),
            "accuracy_first": (
                _measured(first.accuracy_after, first.accuracy_before) if first else None
            ),
            "accuracy_last": _measured(last.accuracy_before, last.accuracy_after) if last else None,
            "loss_last": last.loss_last if last else None,
            "rows": device.rows,
        }
    measured = [v["accuracy_last"] for v in views.values() if v["accuracy_last"] is not None]
    return {
        "run": run,
        "state": phase,
        "round": min(state.round, state.plan.last),
        "rounds": state.plan.last - 1,
        "version": version,
        "devices": views,
        "rejected": list(rejected),
        "mean_accuracy": sum(measured) / len(measured) if measured else None,
    }

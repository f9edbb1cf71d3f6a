"""Facts of one run, each one number: bytes, simulated time, failures, coverage, forgetting."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.federated.read_runs import Run
from benchmarks.federated.results import FORGETTING, values_at


def bytes_up(run: Run) -> float:
    """Bytes all devices sent in the run."""
    return float(sum(r.bytes_up for r in run.rounds))


def bytes_down(run: Run) -> float:
    """Bytes all devices received in the run's leases, the last ones, which only measure, among them."""
    return float(sum(r.bytes_down for r in run.rounds) + run.last_bytes_down)


def profile_bytes(run: Run) -> float:
    """Bytes of experts that all devices streamed once, to profile the full model before the first round."""
    return float(run.profile_bytes)


def bytes_both(run: Run) -> float:
    """Bytes up and down."""
    return bytes_up(run) + bytes_down(run)


def simulated_seconds(run: Run) -> float:
    """Simulated time of the run: the slowest device of every round."""
    return sum(r.seconds for r in run.rounds)


def failures(run: Run) -> float:
    """Devices that failed, summed over rounds."""
    return float(sum(len(r.failed) for r in run.rounds))


def last_diagnostic(name: str) -> Callable[[Run], float | None]:
    """A function of a run: the last round's diagnostic `name`, None where it has none."""

    def read(run: Run) -> float | None:
        value = getattr(run.rounds[-1], name) if run.rounds else None
        return None if value is None else float(value)

    return read


def mean_diagnostic(name: str) -> Callable[[Run], float | None]:
    """A function of a run: the mean over rounds of `name`, over the rounds that have it."""

    def read(run: Run) -> float | None:
        values = [v for v in (getattr(r, name) for r in run.rounds) if v is not None]
        return float(np.mean(values)) if values else None

    return read


def forgetting(run: Run) -> float | None:
    """Held-out language-model loss after training - before, in nats; above 0 is forgetting."""
    for split in ("test", "validation"):
        found = values_at(run, "global", *FORGETTING, split)
        if 0 in found and max(found) > 0:
            return found[max(found)].value - found[0].value
    return None


def bytes_per_parameter(run: Run) -> float | None:
    """Bytes up by parameter sent; None where the run did not count its parameters."""
    counts = [r.parameters_up for r in run.rounds]
    known = [c for c in counts if c is not None]
    if not counts or len(known) < len(counts) or not sum(known):
        return None
    return bytes_up(run) / sum(known)

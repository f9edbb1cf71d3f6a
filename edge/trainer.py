"""The work of a lease: measure, train, measure again. Sessions and batches in, an update's contents out; no I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge import slots
from edge.adamw import AdamW
from edge.data import Prompter, Row, evaluation_batches, training_batches
from edge.session import (
    Artifact,
    Backend,
    Batch,
    EvaluateSession,
    FloatArrays,
    Resident,
    TrainSession,
)
from edge.statistics import RoutingSums, Score

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A lease whose training went wrong: the update would be worthless."""


class Abandoned(RuntimeError):
    """The lease is no longer wanted; raised between steps."""


@dataclass(frozen=True)
class Job:
    """The part of a lease that training needs."""

    work: Literal["profile", "train", "evaluate"]
    resident: Resident
    trained: Resident
    steps: int
    learning_rate: float
    router_learning_rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What the work gave. Without training, before and after are the same, and `adapter` is empty."""

    adapter: FloatArrays  # global names, trained experts
    stats: FloatArrays  # [L, E]
    tokens: int
    steps: int
    losses: tuple[float, float]  # of the first and last step
    before: tuple[float, float]  # (loss, accuracy) on held-back rows
    after: tuple[float, float]
    held_back_rows: int
    missed_mass: tuple[float, ...]


def evaluate(
    session: EvaluateSession,
    adapter: Mapping[str, NDArray[np.float32]],
    batches: Iterable[Batch],
    first: NDArray[np.int64] | None,
    check: Callable[[], None],
    sums: RoutingSums | None = None,
) -> Score:
    """Run every batch; routing is added to `sums`."""
    score = Score()
    for batch in batches:
        check()
        logits, stats = session.evaluate(batch, adapter)
        score.add(logits, batch, first)
        if sums is not None:
            sums.add(batch, stats)
    return score


def train(
    session: TrainSession,
    batches: Iterable[Batch],
    job: Job,
    sums: RoutingSums,
    check: Callable[[], None],
) -> tuple[float, float]:
    """Step through `batches`, changing the session's parameters; returns the first and the last loss.

    Raises
    ------
    TrainingError
        When the loss or a gradient is no longer finite.
    """
    parameters = session.parameters()
    wanted = slots.names_of(job.trained, parameters)
    optimizer = AdamW(
        {
            name: job.router_learning_rate if ".router." in name else job.learning_rate
            for name in wanted
        }
    )
    losses: list[float] = []
    for batch in batches:
        check()
        if not batch.weights.any():
            continue  # rows too short to hold an answer: the loss would be 0 / 0
        loss, routed = session.forward_backward(batch)
        gradients = session.gradients()
        norm = optimizer.step(parameters, gradients)
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise TrainingError(f"step {len(losses) + 1}: loss {loss}, gradient norm {norm}")
        sums.add_routed(routed, job.trained)
        sums.add_taylor(session.taylor())
        losses.append(loss)
    if not losses:
        raise TrainingError("no step could be made: every row is too short")
    return losses[0], losses[-1]


def work(
    backend: Backend,
    artifact: Artifact,
    adapter: FloatArrays,
    job: Job,
    prompts: Prompter,
    train_rows: list[Row],
    held_back: list[Row],
    check: Callable[[], None],
) -> Result:
    """Do what the lease asks for.

    Parameters
    ----------
    adapter : global names, what the slots start from
    check : called between batches; raises `Abandoned` to stop

    Notes
    -----
    Statistics describe the adapter that every device starts from. Selection needs more tokens than a few held-back
    rows hold, so that profiling also looks at as many training rows; accuracy never does.
    """
    base = artifact.base
    first = None if prompts.verbaliser is None else prompts.verbaliser.first
    sums = RoutingSums(base.moe_layers, base.num_experts, job.resident)
    reader = backend.open_evaluate(artifact, job.resident)
    try:
        before = evaluate(
            reader, adapter, evaluation_batches(prompts, held_back), first, check, sums
        )
        if job.work == "profile":
            order = np.random.default_rng(job.seed).permutation(len(train_rows))
            more = [train_rows[i] for i in order[: max(len(held_back), prompts.batch)]]
            evaluate(reader, adapter, evaluation_batches(prompts, more), first, check, sums)
    finally:
        reader.close()
    after, losses, steps, tensors = before, (before.loss, before.loss), 0, {}
    if job.work == "train":
        rng = np.random.default_rng(job.seed)
        session = backend.open_train(artifact, job.resident)
        try:
            session.load(adapter)
            data = training_batches(prompts, train_rows, job.steps, rng)
            losses = train(session, data, job, sums, check)
            after_training = {n: value.copy() for n, value in session.parameters().items()}
        finally:
            session.close()
        steps = job.steps
        tensors = {n: after_training[n] for n in slots.names_of(job.trained, after_training)}
        reader = backend.open_evaluate(artifact, job.resident)
        try:
            after = evaluate(
                reader, after_training, evaluation_batches(prompts, held_back), first, check
            )
        finally:
            reader.close()
    return Result(
        adapter=tensors,
        stats=sums.arrays(),
        tokens=sums.tokens,
        steps=steps,
        losses=losses,
        before=(before.loss, before.accuracy),
        after=(after.loss, after.accuracy),
        held_back_rows=len(held_back),
        missed_mass=sums.missed_mass(),
    )

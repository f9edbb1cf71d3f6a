"""The work of a lease: measure, train, measure again. Sessions and batches in, an update's contents out; no I/O."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge import slots
from edge.adamw import AdamW
from edge.balance_targets import Targets, evenness
from edge.corrections import Control, pull_back
from edge.data import Prompter, Row, by_label, evaluation_batches, training_batches
from edge.session import (
    Artifact,
    Backend,
    Batch,
    EvaluateSession,
    FloatArrays,
    Resident,
    Terms,
    TrainSession,
)
from edge.statistics import LabelCounts, RoutingSums, Score
from protocol import names
from protocol.objective import Objective

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
    objective: Objective = Objective()


@dataclass(frozen=True)
class Result:
    """What the work gave. Without training, before and after are the same, and `adapter` is empty.

    Attributes
    ----------
    control : `scaffold.<name>` -> change of this device's control variate, to be sent
    kept : what stays on the device for its next lease: personal lora_B and output scales under their names, control
        variates as `scaffold.<name>`
    """

    adapter: FloatArrays  # global names, trained experts, what the objective sends
    stats: FloatArrays  # [L, E]
    tokens: int
    steps: int
    losses: tuple[float, float]  # of the first and last step
    before: tuple[float, float]  # (loss, accuracy) on held-back rows
    after: tuple[float, float]
    held_back_rows: int
    missed_mass: tuple[float, ...]
    control: FloatArrays = field(default_factory=dict)
    kept: FloatArrays = field(default_factory=dict)


def terms_of(objective: Objective) -> Terms:
    """The part of an objective that is inside a program's graph."""
    return Terms(
        label_smoothing=objective.label_smoothing,
        balance=objective.balance,
        target_balance=objective.target_balance,
        z_loss=objective.z_loss,
        cap=objective.cap,
        cap_where=objective.cap_where,
        active=objective.active,
    )


def label_bias(
    prompts: Prompter, rows: Sequence[Row], tau: float, vocabulary: int
) -> NDArray[np.float32] | None:
    """What `Objective.label_prior` adds to the logits of the labels' first tokens, [V]; None without labels.

    Half a row more of each label than there are, so that a label that the device has never seen gets a finite share.
    `vocabulary` is the base's: that of its tokenizer may be smaller.
    """
    verbaliser = prompts.verbaliser
    if verbaliser is None or not tau:
        return None
    counts = np.full(len(verbaliser.labels), 0.5)
    for row in rows:
        counts[verbaliser.labels.index(str(row.label))] += 1
    bias = np.zeros(vocabulary, np.float32)
    bias[verbaliser.first] = tau * np.log(counts / counts.sum())
    return bias


def trained_names(job: Job, parameters: Mapping[str, object]) -> list[str]:
    """Those of a session's parameters that the lease trains."""
    wanted = [n for n in slots.names_of(job.trained, parameters) if job.objective.trains(n)]
    if job.objective.output_scale:
        scales = {names.output_scale(layer) for layer in job.resident}
        wanted += [n for n in parameters if n in scales]
    return wanted


def with_kept(adapter: FloatArrays, kept: FloatArrays, objective: Objective) -> FloatArrays:
    """A lease's adapter with what this device keeps to itself: its lora_B (`personal`), its output scales.

    A factor that was kept for a slot of another rank is of no use: the adapter's own stays.
    """
    mine = dict(adapter)
    for name, value in kept.items():
        if objective.personal and name.endswith(".lora_B") and name in adapter:
            if value.shape == adapter[name].shape:
                mine[name] = value
        if objective.output_scale and name.endswith(".output_scale"):
            mine[name] = value
    return mine


def evaluate(
    session: EvaluateSession,
    adapter: Mapping[str, NDArray[np.float32]],
    batches: Iterable[Batch],
    first: NDArray[np.int64] | None,
    check: Callable[[], None],
    sums: RoutingSums | None = None,
    counts: LabelCounts | None = None,
    bias: NDArray[np.float32] | None = None,
) -> Score:
    """Run every batch; routing is added to `sums`, by label to `counts`, `bias` [V] to first answer tokens' logits."""
    score = Score(bias)
    for batch in batches:
        check()
        logits, stats = session.evaluate(batch, adapter)
        score.add(logits, batch, first)
        if sums is not None:
            sums.add(batch, stats)
        if counts is not None:
            counts.add(batch, stats)
    return score


def train(
    session: TrainSession,
    batches: Iterable[Batch],
    job: Job,
    sums: RoutingSums,
    check: Callable[[], None],
    control: Control | None = None,
    targets: Targets | None = None,
    logit_bias: NDArray[np.float32] | None = None,
) -> tuple[float, float]:
    """Step through `batches`, changing the session's parameters; returns the first and the last loss.

    Parameters
    ----------
    control : SCAFFOLD's control variates, which take part in every step; None without
    targets : of the heterogeneity-aware balance, which follow every step; None without
    logit_bias : [V], see `label_bias`

    Raises
    ------
    TrainingError
        When the loss or a gradient is no longer finite.
    """
    parameters = session.parameters()
    wanted = trained_names(job, parameters)
    prox, terms = job.objective.prox, terms_of(job.objective)
    if logit_bias is not None:
        terms = replace(terms, logit_bias=logit_bias)
    start = {n: parameters[n].copy() for n in wanted} if prox else {}
    optimizer = AdamW(
        {
            name: job.router_learning_rate if ".router." in name else job.learning_rate
            for name in wanted
        },
        eps=job.objective.adam_eps,
    )
    losses: list[float] = []
    for batch in batches:
        check()
        if not batch.weights.any():
            continue  # rows too short to hold an answer: the loss would be 0 / 0
        if targets is not None:
            terms = replace(terms, targets=targets.now())
        loss, routed = session.forward_backward(batch, terms)
        gradients = session.gradients()
        if prox or control is not None:
            gradients = {n: gradients[n].copy() for n in wanted}
        if prox:
            pull_back(gradients, parameters, start, prox)
        if control is not None:
            control.correct(gradients)
        norm = optimizer.step(parameters, gradients)
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise TrainingError(f"step {len(losses) + 1}: loss {loss}, gradient norm {norm}")
        sums.add_routed(routed, job.trained)
        sums.add_taylor(session.taylor())
        if targets is not None:
            targets.follow(routed)
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
    shared: FloatArrays | None = None,
    kept: FloatArrays | None = None,
) -> Result:
    """Do what the lease asks for.

    Parameters
    ----------
    adapter : global names, what the slots start from
    check : called between batches; raises `Abandoned` to stop
    shared : what else came with the lease's adapter: `scaffold.<name>`, `trained_counts`
    kept : `Result.kept` of former leases, the newest of each name

    Notes
    -----
    Statistics describe the adapter that every device starts from. Selection needs more tokens than a few held-back
    rows hold, so that profiling also looks at as many training rows; accuracy never does.
    """
    base, objective = artifact.base, job.objective
    shared, kept = shared or {}, kept or {}
    adapter = with_kept(adapter, kept, objective)
    first = None if prompts.verbaliser is None else prompts.verbaliser.first
    labels = 0 if prompts.verbaliser is None else len(prompts.verbaliser.labels)
    sums = RoutingSums(base.moe_layers, base.num_experts, job.resident)
    counts = LabelCounts(base.moe_layers, base.num_experts, labels)
    bias = label_bias(prompts, train_rows, objective.label_prior, base.vocabulary)
    reader = backend.open_evaluate(artifact, job.resident)
    try:
        before = evaluate(
            reader, adapter, by_label(prompts, held_back), first, check, sums, counts, bias
        )
        if job.work == "profile":
            order = np.random.default_rng(job.seed).permutation(len(train_rows))
            more = [train_rows[i] for i in order[: max(len(held_back), prompts.batch)]]
            evaluate(reader, adapter, by_label(prompts, more), first, check, sums, counts, bias)
    finally:
        reader.close()
    after, losses, steps, tensors = before, (before.loss, before.loss), 0, {}
    changes: FloatArrays = {}
    keep: FloatArrays = {}
    if job.work == "train":
        rng = np.random.default_rng(job.seed)
        session = backend.open_train(artifact, job.resident)
        try:
            session.load(adapter)
            data = training_batches(prompts, train_rows, job.steps, rng)
            sent = [n for n in slots.names_of(job.trained, adapter) if objective.sends(n)]
            control = _control(sent, adapter, shared, kept) if objective.scaffold else None
            targets = None
            if objective.target_balance:
                targets = Targets(
                    job.resident,
                    sums.shares(),
                    evenness((row.label for row in train_rows), labels),
                    shared.get("trained_counts"),
                    objective.target_mix,
                    objective.target_kappa,
                )
            losses = train(session, data, job, sums, check, control, targets, bias)
            after_training = {n: value.copy() for n, value in session.parameters().items()}
        finally:
            session.close()
        steps = job.steps
        tensors = {n: after_training[n] for n in sent}
        trained = trained_names(job, after_training)
        keep = {n: after_training[n] for n in trained if not objective.sends(n)}
        if control is not None:
            own, moved = control.renewed()
            keep |= {names.SCAFFOLD + n: value for n, value in own.items()}
            changes = {names.SCAFFOLD + n: value for n, value in moved.items()}
        reader = backend.open_evaluate(artifact, job.resident)
        try:
            after = evaluate(
                reader,
                after_training,
                evaluation_batches(prompts, held_back),
                first,
                check,
                bias=bias,
            )
        finally:
            reader.close()
    stats = sums.arrays()
    if "label_information" in stats:
        stats["label_information"] = counts.information()
    return Result(
        adapter=tensors,
        stats=stats,
        tokens=sums.tokens,
        steps=steps,
        losses=losses,
        before=(before.loss, before.accuracy),
        after=(after.loss, after.accuracy),
        held_back_rows=len(held_back),
        missed_mass=sums.missed_mass(),
        control=changes,
        kept=keep,
    )


def _control(
    sent: list[str], adapter: FloatArrays, shared: FloatArrays, kept: FloatArrays
) -> Control:
    """The control variates of what is sent, as far as their shape still is that of the slot."""

    def fitting(found: FloatArrays) -> FloatArrays:
        named = {n: found[names.SCAFFOLD + n] for n in sent if names.SCAFFOLD + n in found}
        return {n: value for n, value in named.items() if value.shape == adapter[n].shape}

    return Control(sent, fitting(shared), fitting(kept))

"""How good an adapter is: accuracy, F1, ROUGE-2 and answer loss of a model on rows; the same code for both models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.federated import metrics
from benchmarks.federated.tasks import TaskData
from edge.data import Prompter, Row, encode, evaluation_batches
from edge.objective_torch import with_prior
from edge.routed_torch import RoutedSession
from edge.session import PLAIN, Batch, Terms

Scores = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """Metric -> value, and for accuracy which rows were right."""

    scores: Scores
    rows: int
    right: NDArray[np.bool_] | None = None


def measure(
    session: RoutedSession,
    prompts: Prompter,
    task: TaskData,
    rows: Sequence[Row],
    terms: Terms = PLAIN,
    *,
    bias: NDArray[np.float32] | None = None,
    generate: bool = True,
) -> Measured:
    """Score rows of one task under the adapter that the session has loaded.

    Accuracy chooses the label whose first token is the likeliest of all labels'. F1 and ROUGE-2 are of greedy answers
    of at most K tokens, and are left out without `generate`. `answer_loss` is nats per answer token. `bias` [V] is
    what a device adds to the logits of the first answer token (`Objective.label_prior`).
    """
    nll, weight, right = 0.0, 0.0, []
    first = None
    if task.labels:
        first = torch.tensor([encode(prompts.tokenizer, " " + x)[0] for x in task.labels])
    for at, batch in zip(
        range(0, len(rows), prompts.batch), evaluation_batches(prompts, rows), strict=True
    ):
        there = rows[at : at + prompts.batch]
        logits = session.logits(batch, terms)
        if bias is not None:
            first_of_row = logits.view(*batch.targets.shape, -1)[:, 0]
            first_of_row.copy_(with_prior(first_of_row, bias))
        log = F.log_softmax(logits, -1)
        picked = log.gather(1, torch.from_numpy(batch.targets).reshape(-1, 1))[:, 0]
        share = torch.from_numpy(batch.weights).reshape(-1)
        nll -= float((picked * share).sum())
        weight += float(share.sum())
        if first is not None:
            guess = logits.view(*batch.targets.shape, -1)[: len(there), 0][:, first].argmax(-1)
            right += [task.labels[int(g)] == row.label for g, row in zip(guess, there, strict=True)]
    scores = {"answer_loss": nll / max(weight, 1e-9)}
    if task.labels:
        scores["accuracy"] = float(np.mean(right)) if right else 0.0
        return Measured(scores, len(rows), np.array(right, bool))
    if generate:
        answers = greedy(session, prompts, rows)
        each = metrics.text_scores(task.metric, answers, [str(row.label) for row in rows])
        scores[task.metric] = float(each.mean()) if len(each) else 0.0
    return Measured(scores, len(rows))


@torch.no_grad()  # type: ignore[untyped-decorator]
def greedy(session: RoutedSession, prompts: Prompter, rows: Sequence[Row]) -> list[str]:
    """The likeliest answer of at most K tokens to each prompt, with a cache; prompts are padded on the left."""
    end, model, device = prompts.end, session.body.model, session.body.device
    answers: list[str] = []
    for at in range(0, len(rows), 64):
        asked = [
            encode(prompts.tokenizer, row.text)[-(prompts.sequence - prompts.answers) :]
            for row in rows[at : at + 64]
        ]
        width = max(len(ids) for ids in asked)
        tokens = torch.zeros(len(asked), width, dtype=torch.long)
        mask = torch.zeros(len(asked), width, dtype=torch.long)
        for i, ids in enumerate(asked):
            tokens[i, width - len(ids) :] = torch.tensor(ids)
            mask[i, width - len(ids) :] = 1
        session.free_run()
        tokens, mask = tokens.to(device), mask.to(device)
        cache, given = None, tokens
        said = tokens[:, :0]
        for _ in range(prompts.answers):
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, -given.shape[1] :]
            out = model.model(
                given,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            given = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
            said = torch.cat((said, given), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        for ids in said.tolist():
            kept = ids[: ids.index(end)] if end in ids else ids
            answers.append(prompts.tokenizer.decode(kept))
    return answers


def text_loss(session: RoutedSession, windows: NDArray[np.int64]) -> float:
    """Mean loss in nats per token of plain text, tokens 2 to the end of each window; the measure of forgetting."""
    rows, length = windows.shape
    total, count = 0.0, 0
    for at in range(0, rows, 16):
        tokens = windows[at : at + 16]
        places = np.arange(length - 1)[None, :] + np.arange(len(tokens))[:, None] * length
        targets = tokens[:, 1:]
        batch = Batch(
            tokens,
            np.ones(tokens.shape, np.float32),
            places,
            targets,
            np.ones(targets.shape, np.float32),
            np.full(len(tokens), -1),
        )
        log = F.log_softmax(session.logits(batch), -1)
        picked = log.gather(1, torch.from_numpy(targets).reshape(-1, 1))
        total -= float(picked.sum())
        count += targets.size
    return total / count

"""Accuracy of the whole model with the global adapter, loaded through stock PEFT, on rows that no device has.

    echo STATE/adapters/3 | python -m lab.evaluate --base DIR --rows test.jsonl --task task.json --sequence 32

Reads names of adapter folders from stdin ("-": the base alone), one to a line; writes one JSON line each, at once.
The model is loaded afresh for every adapter, as a user would.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from edge import data
from edge.data import Prompter
from edge.session import Batch
from lab import dataset
from protocol import schema
from protocol.messages import Task


@dataclass(frozen=True)
class Score:
    """How good one adapter is; `adapter` as it was asked for."""

    adapter: str
    accuracy: float
    loss: float  # mean over answer tokens, nats
    rows: int


def load_base(folder: Path) -> Any:
    """The checkpoint in float32, ready to evaluate."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_adapted(base: Path, adapter: Path) -> Any:
    """The checkpoint with an adapter; refuses one that PEFT does not take whole.

    Raises
    ------
    RuntimeError
        PEFT reports keys that are missing or that it does not know.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        try:
            return PeftModel.from_pretrained(load_base(base), str(adapter)).eval()
        except UserWarning as error:
            raise RuntimeError(f"{adapter}: {error}") from error


def answer_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits at the answer positions, [B, K, V]; columns that are padding in every row are not computed."""
    length = int(batch.valid.sum(1).max())
    rows = np.arange(len(batch.tokens))[:, None]
    places = batch.positions - rows * batch.tokens.shape[1]
    places = torch.from_numpy(np.clip(places, 0, length - 1))
    # Padding is on the right and attention is causal: it cannot reach an answer.
    hidden = model(input_ids=torch.from_numpy(batch.tokens[:, :length]))
    return hidden.logits[torch.from_numpy(rows), places]


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean negative log likelihood of the answer tokens."""
    weights = torch.from_numpy(batch.weights)
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.targets).flatten(), reduction="none"
    )
    return (each * weights.flatten()).sum() / weights.sum()


@torch.no_grad()  # type: ignore[untyped-decorator]
def score(model: Any, prompts: Prompter, rows: Sequence[data.Row], name: str) -> Score:
    """Accuracy: the label whose first token is the likeliest of all labels' is the row's own."""
    assert prompts.verbaliser is not None
    first = torch.from_numpy(prompts.verbaliser.first)
    right, losses, weight = 0, 0.0, 0.0
    for batch in data.evaluation_batches(prompts, rows):
        logits = answer_logits(model, batch)
        chosen = logits[:, 0, first].argmax(-1).numpy()
        right += int((chosen == batch.labels).sum())
        share = float(batch.weights.sum())
        losses += float(answer_loss(logits, batch)) * share
        weight += share
    return Score(name, right / len(rows), losses / weight, len(rows))


def prompter_of(task: Path, base: Path, batch: int, sequence: int, answers: int) -> Prompter:
    """The devices' own prompter, for this run's task and the base's tokenizer."""
    tokenizer: Any = Tokenizer.from_file(str(base / "tokenizer.json"))
    return data.prompter(
        tokenizer,
        schema.from_dict(Task, json.loads(task.read_text(encoding="utf-8")), str(task)),
        batch,
        sequence,
        answers,
    )


def shared_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that `lab.central` has too."""
    parser.add_argument("--base", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--rows", type=Path, required=True, help="test rows, JSON lines")
    parser.add_argument("--task", type=Path, required=True, help="the server's task file")
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)


def test_rows(path: Path) -> list[data.Row]:
    """Rows as the prompter wants them."""
    return [data.Row(row.text, row.label) for row in dataset.load(path)]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shared_flags(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = test_rows(args.rows)
    prompts = prompter_of(args.task, args.base, 32, args.sequence, args.answers)
    for line in sys.stdin:
        if name := line.rstrip("\n"):
            model = load_base(args.base) if name == "-" else load_adapted(args.base, Path(name))
            print(json.dumps(asdict(score(model, prompts, rows, name))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

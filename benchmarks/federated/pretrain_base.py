"""The benchmark's base: the reference base, trained further on text of the tasks' domains.

    python -m benchmarks.federated.pretrain_base --data DIR --out news --minutes 24
    python -m benchmarks.federated.pretrain_base --data DIR --from news --out base --minutes 3 --threads 2 --shown

A pretrained model has seen the news before it is fine-tuned on them, and knows what a question is; the reference base
does not, and under strong label skew nothing learns from it. So it goes on, first with unlabelled text: AG News
articles and XSum documents of the training files, never with a row of a test file; and with instruction tasks that
the scoreboard does not use. Then (`--shown`) with a tenth of the training rows of the three tasks, answers and all,
which no client has (`tasks.public`): it starts from some skill, as a real model does. That text is not free for
redistribution: the model is made on the spot and does not ship.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.federated import tasks
from benchmarks.federated.tasks import SUPERNI, read
from reference_base import corpus
from reference_base.pretrain import MIX, pretrain

REFERENCE = Path(__file__).parents[2] / "reference_base" / "model"
ANSWERING = (
    "task002_quoref_answer_generation",
    "task1510_evalution_relation_extraction",
    "task1590_diplomacy_text_generation",
    "task1729_personachat_generate_next",
    "task639_multi_woz_user_utterance_generation",
)
HELD_OUT = 50  # one document in so many
SIXTH = 6  # of the public rows: with all of them there is nothing left to learn
NEW = {"news": 0.4, "answers": 0.1}


def documents(data: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Seen and held-out documents by domain: the reference base's own, news, and answers to instructions."""
    seen, held = corpus.documents(data)
    news = [f"Text: {row['text']}" for row in read(data / "agnews/train.jsonl.gz")]
    news += [f"Text: {row['document']}" for row in read(data / "xsum_superni/train.jsonl.gz")]
    answers = [
        f"Text: {row['input']}\nInstruction: {SUPERNI[row['task']].words}\nResponse: {row['output']}"
        for row in read(data / "superni_mix/train.jsonl.gz")
        if row["task"] in ANSWERING
    ]
    for domain, texts in (("news", news), ("answers", answers)):
        held[domain] = texts[::HELD_OUT]
        seen[domain] = [text for i, text in enumerate(texts) if i % HELD_OUT]
    return seen, held


def shown(data: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """`documents`, and the public rows of the tasks, at the lengths of both kinds of suites."""
    seen, held = documents(data)
    tokenizer = Tokenizer.from_file(str(REFERENCE / "tokenizer.json"))
    texts = []
    for name, sequence, answers in (
        ("agnews", 32, 2),
        ("agnews", 64, 12),
        ("squad", 64, 12),
        ("xsum", 64, 12),
    ):
        rows = tasks.shown(data, name, tokenizer, sequence=sequence, answers=answers)
        texts += [f"{row.text} {row.label}" for row in rows[::SIXTH]]
    np.random.default_rng(0).shuffle(texts)
    held["shown"] = texts[::HELD_OUT]
    seen["shown"] = texts
    return seen, held


def mix_shown() -> dict[str, float]:
    """A quarter of the text are the public rows."""
    return {**{domain: share * 0.75 for domain, share in mix().items()}, "shown": 0.25}


def mix() -> dict[str, float]:
    """Share of each domain: the old ones in their old proportions beside the new."""
    left = 1 - sum(NEW.values())
    return {**{domain: share * left for domain, share in MIX.items()}, **NEW}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--from", dest="start", type=Path, default=REFERENCE, help="go on from it")
    parser.add_argument("--shown", action="store_true", help="with the tasks' public rows")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    read, shares = (shown, mix_shown()) if args.shown else (documents, mix())
    pretrain(args.data, args.out, args.minutes, 19, 1, args.start, read, shares)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The clean pretraining text: documents of four domains, each split into seen and held-out parts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
PAD = "<|pad|>"
HELD_OUT = 0.02  # share of each book and of dolly's rows that training never sees
DOMAINS = ("fiction", "verse", "instructions", "encyclopedia")
VERSE = ("blake", "milton", "shakespeare", "whitman")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _dolly(row: dict[str, Any]) -> str:
    context = f"Text: {row['context']}\n" if row["context"] else ""
    return f"{context}Instruction: {row['instruction']}\nResponse: {row['response']}"


def _squad(paragraph: str, title: str | None, questions: list[tuple[str, str]]) -> str:
    topic = f"Topic: {title.replace('_', ' ')}\n" if title else ""
    asked = "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in questions)
    return f"Text: {paragraph}\n{topic}{asked}"


def _paragraphs(path: Path) -> Iterator[str]:
    """One document per distinct SQuAD paragraph: text, its article's title, its questions."""
    grouped: dict[str, tuple[str | None, list[tuple[str, str]]]] = {}
    for row in _rows(path):
        answers = row["answers"]
        answer = answers["text"][0] if isinstance(answers, dict) else answers[0]["text"]
        grouped.setdefault(row["context"], (row["title"], []))[1].append((row["question"], answer))
    for context, (title, questions) in grouped.items():
        yield _squad(context, title, questions)


def documents(data: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Read the four domains below `data`.

    Returns
    -------
    (seen, held_out) : two dicts of domain -> documents, disjoint
    """
    seen: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    held: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    for book in _rows(data / "gutenberg/books.jsonl.gz"):
        domain = "verse" if book["title"].startswith(VERSE) else "fiction"
        cut = int(len(book["text"]) * (1 - HELD_OUT))
        seen[domain].append(book["text"][:cut])
        held[domain].append(book["text"][cut:])
    for index, row in enumerate(_rows(data / "dolly15k/train.jsonl.gz")):
        part = held if index % int(1 / HELD_OUT) == 0 else seen
        part["instructions"].append(_dolly(row))
    seen["encyclopedia"] += _paragraphs(data / "squad_subset/train.jsonl.gz")
    held["encyclopedia"] += list(_paragraphs(data / "squad_subset/validation.jsonl.gz"))[:150]
    with gzip.open(data / "wikitext2_valid/valid.txt.gz", "rt", encoding="utf-8") as file:
        wikitext = file.read()
    cut = int(len(wikitext) * 0.9)
    seen["encyclopedia"].append(wikitext[:cut])
    held["encyclopedia"].append(wikitext[cut:])
    return seen, held


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE: any text can be written, none is lost."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.uint16]:
    """Concatenate the documents' tokens, each followed by the end token; shape [tokens]."""
    end = tokenizer.token_to_id(END)
    pieces: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        pieces += [*encoding.ids, end]
    return np.asarray(pieces, dtype=np.uint16)

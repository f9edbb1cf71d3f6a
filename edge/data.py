"""Local text -> token batches. Nothing here is ever sent. Pure but for `read_rows`.

Letters: B batch rows, S tokens per row, K answer positions per row.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

# numpy loads this module on first use; it belongs to the process, not to a lease's memory (see `limits`).
from numpy.random import Generator
from numpy.typing import NDArray

from edge.session import Batch
from protocol.manifest import BaseIndex
from protocol.messages import Task

MAX_LINE = 4 << 20


class DataError(ValueError):
    """A data file that cannot be used; the message names the file and the line."""


class Encoding(Protocol):
    """What `tokenizers` gives back."""

    ids: list[int]


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` that is used."""

    def encode(self, sequence: str, *, add_special_tokens: bool = True) -> Encoding:
        """Text to tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens to text."""

    def get_vocab_size(self) -> int:
        """Number of tokens."""


@dataclass(frozen=True)
class Row:
    """One example; `label` is the whole answer where answers are free text."""

    text: str
    label: str | None = None


@dataclass(frozen=True)
class Verbaliser:
    """The answer tokens of each label; `codes`: they are not the label's own words."""

    labels: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]
    codes: bool

    @property
    def first(self) -> NDArray[np.int64]:
        """First answer token of each label; all different."""
        return np.array([answer[0] for answer in self.answers], dtype=np.int64)


def read_rows(path: Path, text_field: str, label_field: str | None) -> list[Row]:
    """Read JSON lines, gzipped when the name ends in `.gz`.

    Raises
    ------
    DataError
        No such file, not gzip, not UTF-8, not JSON, a field missing or not text, no rows at all.
    """
    rows: list[Row] = []
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            while line := file.readline(MAX_LINE):
                number += 1
                if line.strip():
                    rows.append(_row(line, text_field, label_field, f"{path}:{number}"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error}") from error
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _row(line: bytes, text_field: str, label_field: str | None, where: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a line of JSON") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {type(value).__name__} found, an object wanted")

    def field(name: str) -> str:
        if name not in value:
            raise DataError(
                f"{where}: no field {name!r}; fields here: {', '.join(sorted(map(str, value)))}"
            )
        found = value[name]
        if not isinstance(found, str | int) or isinstance(found, bool):
            raise DataError(f"{where}: field {name!r} is {type(found).__name__}, text wanted")
        return str(found)

    return Row(field(text_field), None if label_field is None else field(label_field))


def check_labels(rows: Sequence[Row], task: Task, where: str) -> None:
    """Every row has one of the run's labels, or an answer of its own; raises DataError naming the nearest label."""
    labels = task.labels
    known = set(labels)
    for number, row in enumerate(rows, 1):
        if row.label is None and task.answer == "text":
            raise DataError(f"{where}: the run wants answers, name the field that holds them")
        if row.label is None and labels:
            raise DataError(f"{where}: the run has labels, name the field that holds them")
        if labels and row.label not in known:
            close = difflib.get_close_matches(str(row.label), list(labels), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(labels)[:200]}"
            raise DataError(f"{where}: row {number} has the label {row.label!r}; {hint}")


def split_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(training rows, held-back rows): one in five by the hash of its text, the same on every run and device."""
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(row.text.encode("utf-8", "surrogatepass")).digest()
        parts[int.from_bytes(digest, "big") % 5 == 0].append(row)
    return parts


def first_by_hash(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, the same ones every time, whatever the file is sorted by."""
    key = lambda row: hashlib.sha256(row.text.encode("utf-8", "surrogatepass")).digest()  # noqa: E731
    return sorted(rows, key=key)[:count]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text, no special ones. Lone surrogates, which JSON allows, become question marks."""
    clean = text.encode("utf-8", "replace").decode()
    return tokenizer.encode(clean, add_special_tokens=False).ids


def verbalise(labels: Sequence[str], tokenizer: Tokenizer, answers: int) -> Verbaliser:
    """Choose the answer tokens of each label: its own first K, or a code of one token when two labels begin alike.

    Parameters
    ----------
    answers : int
        K, the answer positions of the program.

    Raises
    ------
    DataError
        When the tokenizer has too few tokens for a code each.
    """
    own = tuple(tuple(encode(tokenizer, " " + label)[:answers]) for label in labels)
    if all(own) and len({answer[0] for answer in own}) == len(labels):
        return Verbaliser(tuple(labels), own, codes=False)
    codes: list[int] = []
    for token in _code_tokens(tokenizer):
        if len(codes) == len(labels):
            break
        if token not in codes:
            codes.append(token)
    if len(codes) < len(labels):
        raise DataError(f"{len(labels)} labels, but only {len(codes)} single-token codes")
    return Verbaliser(tuple(labels), tuple((code,) for code in codes), codes=True)


def _code_tokens(tokenizer: Tokenizer) -> Iterator[int]:
    """Single letters first, as in a multiple choice; then every token that is a word, in the vocabulary's order."""
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        ids = encode(tokenizer, " " + letter)
        if len(ids) == 1:
            yield ids[0]
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token])
        if text.startswith(" ") and text[1:].isalpha() and text[1:].isascii():
            yield token


@dataclass(frozen=True)
class Prompter:
    """Rows to batches for one task and one program shape.

    With `seq2seq` the prompt alone is the encoder's input, ended by the token `end` where the model has one, and the
    answer is what the decoder shall say: `positions` stay 0 and are not used. A free-text answer is ended by `end` too
    where it leaves a place for it.
    """

    tokenizer: Tokenizer
    task: Task
    batch: int
    sequence: int
    answers: int
    verbaliser: Verbaliser | None
    seq2seq: bool = False
    end: int | None = None

    def row(self, row: Row, rng: Generator | None) -> tuple[list[int], list[int], list[int]]:
        """Tokens of a row (at most S), the places before its answer tokens (none for a decoder), and those tokens.

        `rng` draws what is free in plain language modelling (which part of a long text, which positions); without it
        the places are evenly spaced, for evaluation.
        """
        if self.task.answer == "text":
            answer = self._free(row)
        elif self.verbaliser is None:
            return self._plain(row, rng)
        else:
            answer = self.verbaliser.answers[self.verbaliser.labels.index(str(row.label))]
        before, _, after = self.task.template.partition("{text}")
        suffix = encode(self.tokenizer, after) if after else []
        ending = [] if self.end is None else [self.end]
        room = self.sequence - len(suffix) - len(ending if self.seq2seq else answer)
        if room < 1:
            raise DataError(
                f"template: {len(suffix)} tokens after {{text}} leave no room in {self.sequence}"
            )
        prompt = encode(self.tokenizer, before + row.text)[:room] + suffix
        if not prompt:
            raise DataError("a row without text under a template without words has nothing to ask")
        if self.seq2seq:
            return [*prompt, *ending], [], list(answer)
        places = [len(prompt) - 1 + k for k in range(len(answer))]
        return [*prompt, *answer], places, list(answer)

    def _free(self, row: Row) -> tuple[int, ...]:
        """The first K tokens of the row's own answer, with the end token if K are not full."""
        words = (row.label or "").strip()
        tokens = encode(self.tokenizer, " " + words) if words else []
        if self.end is not None:
            tokens.append(self.end)
        return tuple(tokens[: self.answers])

    def _plain(self, row: Row, rng: Generator | None) -> tuple[list[int], list[int], list[int]]:
        tokens = encode(self.tokenizer, row.text)
        if self.seq2seq:
            return self._continued(tokens, rng)
        extra = max(0, len(tokens) - self.sequence)
        start = int(rng.integers(0, extra + 1)) if rng is not None else 0
        tokens = tokens[start : start + self.sequence]
        last = len(tokens) - 1
        if last < 1:
            return tokens, [], []
        count = min(self.answers, last)
        if rng is None:
            places = [int(p) for p in np.linspace(0, last - 1, count).round()]
        else:
            places = sorted(int(p) for p in rng.choice(last, count, replace=False))
        return tokens, places, [tokens[p + 1] for p in places]

    def _continued(
        self, tokens: list[int], rng: Generator | None
    ) -> tuple[list[int], list[int], list[int]]:
        """A piece of the text for the encoder, and the K tokens that follow it for the decoder."""
        ending = [] if self.end is None else [self.end]
        if len(tokens) < 2:
            return [*tokens, *ending], [], []
        room = self.sequence - len(ending)
        last = min(room, len(tokens) - 1)
        cut = last if rng is None else int(rng.integers(1, len(tokens)))
        return [*tokens[max(0, cut - room) : cut], *ending], [], tokens[cut : cut + self.answers]

    def assemble(self, rows: Sequence[Row], rng: Generator | None) -> Batch:
        """At most B rows as one batch; rows that are not there are empty and weigh nothing."""
        size = (self.batch, self.sequence)
        tokens, valid = np.zeros(size, np.int64), np.zeros(size, np.float32)
        positions = np.zeros((self.batch, self.answers), np.int64)
        targets = np.zeros((self.batch, self.answers), np.int64)
        weights = np.zeros((self.batch, self.answers), np.float32)
        labels = np.full(self.batch, -1, np.int64)
        for b, row in enumerate(rows):
            ids, places, answer = self.row(row, rng)
            tokens[b, : len(ids)] = ids
            valid[b, : len(ids)] = 1
            positions[b, : len(places)] = b * self.sequence + np.array(places, np.int64)
            targets[b, : len(answer)] = answer
            weights[b, : len(answer)] = 1
            if self.verbaliser is not None:
                labels[b] = self.verbaliser.labels.index(str(row.label))
        return Batch(tokens, valid, positions, targets, weights, labels)


def prompter(
    tokenizer: Tokenizer,
    task: Task,
    batch: int,
    sequence: int,
    answers: int,
    base: BaseIndex | None = None,
) -> Prompter:
    """The prompter of a task, for a causal base unless given; raises DataError when labels cannot be told apart."""
    if task.answer == "text" and task.labels:
        raise DataError(
            f"task: answers are free text, {len(task.labels)} labels found, none wanted"
        )
    verbaliser = verbalise(task.labels, tokenizer, answers) if task.labels else None
    end = None if base is None else base.config.get("eos_token_id")
    end = end if isinstance(end, int) else None
    seq2seq = base is not None and base.architecture == "seq2seq"
    return Prompter(tokenizer, task, batch, sequence, answers, verbaliser, seq2seq, end)


def evaluation_batches(prompts: Prompter, rows: Sequence[Row]) -> Iterator[Batch]:
    """Every row once, in order."""
    for start in range(0, len(rows), prompts.batch):
        yield prompts.assemble(rows[start : start + prompts.batch], None)


def by_label(prompts: Prompter, rows: Sequence[Row]) -> Iterator[Batch]:
    """Every row once, as far as possible in batches of one label, so that statistics can be told apart by it.

    A label's last rows get a batch of their own when they fill half of one; fewer share batches with other labels. So
    there are at most twice as many batches as without.
    """
    rest: list[Row] = []
    for label in sorted({row.label or "" for row in rows}):
        mine = [row for row in rows if (row.label or "") == label]
        for start in range(0, len(mine), prompts.batch):
            piece = mine[start : start + prompts.batch]
            if 2 * len(piece) >= prompts.batch:
                yield prompts.assemble(piece, None)
            else:
                rest += piece
    yield from evaluation_batches(prompts, rest)


def training_batches(
    prompts: Prompter, rows: Sequence[Row], steps: int, rng: Generator
) -> Iterator[Batch]:
    """`steps` batches: passes over the rows, each in a fresh order."""
    waiting: list[Row] = []
    for _ in range(steps):
        while len(waiting) < prompts.batch:
            waiting += [rows[i] for i in rng.permutation(len(rows))]
        yield prompts.assemble(waiting[: prompts.batch], rng)
        waiting = waiting[prompts.batch :]

"""The rows of a run: read or generated, a global test set taken out, the rest divided among the devices."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lab import assistant, partition

MAX_LABELS = 64


class DataError(ValueError):
    """Data that the lab cannot use; the message says what, where and what was wanted."""


@dataclass(frozen=True)
class Row:
    """One text with its label. `group` is what the skew between devices is over."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Split:
    """Rows that no device sees, and the rows of each device. No text is in two of them."""

    labels: tuple[str, ...]
    test: tuple[Row, ...]
    devices: tuple[tuple[Row, ...], ...]


def assistant_rows(per_intent: int, seed: int) -> list[Row]:
    """The default data: generated utterances, skewed between devices by domain."""
    return [Row(u.text, u.intent, u.domain) for u in assistant.generate(per_intent, seed)]


def read(path: Path, text: str, label: str) -> list[Row]:
    """Read JSON lines, gzipped or not.

    Parameters
    ----------
    path : Path
        `.jsonl` or `.jsonl.gz`.
    text, label : str
        Names of the fields.

    Raises
    ------
    DataError
        No such file, not JSON lines, a field missing, one label only or more than MAX_LABELS.
    """
    rows: dict[str, Row] = {}
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8")
            if path.suffix == ".gz"
            else open(path, encoding="utf-8") as lines
        ):
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                value = json.loads(line)
                for field in (text, label):
                    if not isinstance(value, dict) or field not in value:
                        found = ", ".join(value) if isinstance(value, dict) else "no object"
                        raise DataError(f"{path}:{number}: no field '{field}'; found: {found}")
                name = " ".join(str(value[label]).split())
                body = " ".join(str(value[text]).split())
                if body and name:
                    rows.setdefault(body, Row(body, name, name))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not JSON lines: {error}") from error
    labels = {row.label for row in rows.values()}
    if not 2 <= len(labels) <= MAX_LABELS:
        raise DataError(
            f"{path}: {len(labels)} labels in field '{label}', 2 to {MAX_LABELS} wanted"
        )
    return list(rows.values())


def split(
    rows: Sequence[Row],
    devices: int,
    rows_per_device: int,
    test_rows: int,
    alpha: float,
    seed: int,
) -> Split:
    """Take a balanced test set out, then divide the rest by Dirichlet; raises DataError."""
    rng = np.random.default_rng(seed)
    held = partition.balanced([row.label for row in rows], test_rows, rng)
    apart = set(held.tolist())
    rest = [row for index, row in enumerate(rows) if index not in apart]
    try:
        parts = partition.dirichlet(
            [row.group for row in rest], devices, rows_per_device, alpha, rng
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    return Split(
        labels=tuple(sorted({row.label for row in rows})),
        test=tuple(rows[i] for i in held),
        devices=tuple(tuple(rest[i] for i in part) for part in parts),
    )


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write JSON lines with the fields `text`, `label`, `group`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(
        "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
    )
    os.replace(partial, path)


def load(path: Path) -> list[Row]:
    """Inverse of `write`."""
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def fitting_sequence(
    texts: Sequence[str], template: str, tokenizer: Path, answers: int, most: int = 64
) -> int:
    """The length that leaves nine of ten rows whole: a multiple of 16, from 32 to `most` tokens."""
    reader = Tokenizer.from_file(str(tokenizer))
    sample = [template.replace("{text}", text) for text in texts[:: max(1, len(texts) // 500)]]
    lengths = [len(encoding.ids) + answers for encoding in reader.encode_batch(sample)]
    return int(min(most, max(32, -(-float(np.percentile(lengths, 90)) // 16) * 16)))

"""Before the fleet starts: rows, their division among devices, the folder of the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lab import dataset
from lab.dataset import DataError, Row, Split
from lab.scenario import Scenario
from protocol import messages

MARK = "run.json"  # says that a folder is one of ours, which may be replaced
PER_INTENT = 160


class FolderError(ValueError):
    """A folder that a run may not take. One line."""


def read_rows(data: Path | None, text: str, label: str, seed: int) -> list[Row]:
    """The user's rows, or generated ones; raises DataError."""
    if data is None:
        return dataset.assistant_rows(PER_INTENT, seed)
    return dataset.read(data, text, label)


def fit_sequence(chosen: Scenario, rows: Sequence[Row], base: Path) -> Scenario:
    """Fill in the sequence where it is open, and the batch from the tokens of a step; raises DataError."""
    artifact = chosen.artifact
    tokenizer = base / "tokenizer.json"
    if not tokenizer.is_file():
        raise DataError(f"{tokenizer}: no such file; a checkpoint folder with a tokenizer wanted")
    sequence = artifact.sequence or dataset.fitting_sequence(
        [row.text for row in rows], messages.Task().template, tokenizer, artifact.answers
    )
    batch = artifact.batch or max(1, artifact.tokens // sequence)
    return dataclasses.replace(
        chosen, artifact=dataclasses.replace(artifact, sequence=sequence, batch=batch)
    )


def divide(rows: Sequence[Row], chosen: Scenario) -> Split:
    """A test set for the lab, the rest for the devices; raises DataError."""
    data = chosen.data
    return dataset.split(
        rows, len(chosen.device), data.rows_per_device, data.test_rows, data.alpha, chosen.seed
    )


def fresh_folder(out: Path) -> Path:
    """An empty folder for the run; an older run there is replaced, anything else is refused."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).exists())):
        raise FolderError(f"{out}: holds something else than a run, choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return out.resolve()


def write_data(folder: Path, split: Split, chosen: Scenario) -> tuple[Path, Path, dict[str, Path]]:
    """Write the task, the test rows, each device's rows; (task, test, device -> file)."""
    (folder / MARK).write_text(json.dumps(dataclasses.asdict(chosen), indent=1), encoding="utf-8")
    task, test = folder / "task.json", folder / "test.jsonl"
    task.write_text(json.dumps({"labels": split.labels}), encoding="utf-8")
    dataset.write(test, split.test)
    files = {}
    for device, rows in zip(chosen.device, split.devices, strict=True):
        files[device.name] = folder / "data" / f"{device.name}.jsonl"
        dataset.write(files[device.name], rows)
    return task, test, files

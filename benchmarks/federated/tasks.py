"""Tasks of real text: prompts with answers, divided into training, validation and test rows.

    tasks = {name: load(data, name, tokenizer, sequence=64, answers=8) for name in ("agnews", "squad", "xsum")}

Rows are `edge.data.Row`: `text` is the whole prompt in the style of the reference base's pretraining text, `label` the
whole answer. Under `TASK` (template "{text}", free-text answers) a prompt fits in a program of `sequence` tokens with
`answers` answer positions; `Prompter` cuts longer answers, metrics compare with the whole ones.

What makes these tasks easier or other than their namesakes, to be said beside every number:

- squad: the paragraph is cut to a window of words around the answer (its place in the window is drawn by the hash of
  the row), for training and test rows alike, as programs of about 64 tokens hold no paragraph. A long question loses
  its end. The rows are a public subset of SQuAD 1.1; the reference base saw the training paragraphs *with their
  answers* in pretraining, and never a validation paragraph but the text of its own held-out set.
- xsum: a model sees the first words of a document only. There are 1000 training documents.
- superni: a short instruction in place of the published definition, and long inputs cut.

Validation rows are carved out of the training file by hash, the same for every seed and partition. Test rows are for
the last measurement of a run.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.federated.fit import Fitter, around
from benchmarks.federated.topics import topics
from edge import data
from edge.data import Row
from protocol.messages import Task
from reference_base import corpus

TASK = Task(template="{text}", answer="text")
AGNEWS = ("World", "Sports", "Business", "Sci/Tech")
HALVINGS = 3  # eight topics of squad and xsum, for topic skew
ROOM = 8  # tokens of the text that a prompt keeps at the least
Metric = Literal["accuracy", "f1", "rouge2"]


@dataclass(frozen=True)
class Instruction:
    """How a task of superni_mix is asked: in few words, and with the end of the input that matters."""

    words: str
    keep: Literal["start", "end"]
    metric: Metric


SUPERNI = {
    "task002_quoref_answer_generation": Instruction("Answer the question.", "end", "f1"),
    "task073_commonsenseqa_answer_generation": Instruction("Choose A-E.", "start", "accuracy"),
    "task1510_evalution_relation_extraction": Instruction(
        "Name the words and their relation.", "start", "f1"
    ),
    "task1590_diplomacy_text_generation": Instruction("Write the next message.", "end", "f1"),
    "task1687_sentiment140_classification": Instruction(
        "Is it positive or negative?", "start", "accuracy"
    ),
    "task1729_personachat_generate_next": Instruction("Write the next line.", "end", "f1"),
    "task181_outcome_extraction": Instruction("List the outcomes.", "start", "f1"),
    "task591_sciq_answer_generation": Instruction("Answer the question.", "start", "f1"),
    "task639_multi_woz_user_utterance_generation": Instruction(
        "What was said before?", "start", "f1"
    ),
    "task748_glucose_reverse_cause_event_detection": Instruction(
        "What does it cause?", "end", "f1"
    ),
    "task875_emotion_classification": Instruction("Which emotion is it?", "start", "accuracy"),
}


def short(task: str) -> str:
    """Name of a task of superni_mix without its number.

    >>> short("task875_emotion_classification")
    'emotion_classification'
    """
    return re.sub(r"^task\d+_", "", task)


NAMES = ("agnews", "squad", "xsum", *(short(task) for task in SUPERNI))


class TaskError(ValueError):
    """Data that cannot be used, in one line."""


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """One task. `groups` names for each training row what topic skew is over; `labels` is empty for free text."""

    name: str
    metric: Metric
    labels: tuple[str, ...]
    train: tuple[Row, ...]
    groups: tuple[str, ...]
    validation: tuple[Row, ...]
    test: tuple[Row, ...]


@dataclass(frozen=True)
class _Made:
    """A row before the split; rows of one `source` (a paragraph, a document) stay together."""

    row: Row
    source: str


Maker = Callable[[Fitter, dict[str, Any], int], _Made]


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a gzipped JSON-lines file; raises TaskError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)
    except FileNotFoundError as error:
        raise TaskError(
            f"{path}: no such file; --data wants the folder that holds {path.parent.name}/{path.name}"
        ) from error
    except (OSError, EOFError, ValueError) as error:
        raise TaskError(f"{path}: not gzipped JSON lines: {error}") from error


def digest(text: str) -> int:
    """A number drawn by a text, the same everywhere, below 2^64."""
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(found[:8], "big")


def public(source: str) -> bool:
    """Whether a training row belongs to the tenth that no client has: the benchmark's base has learned from it."""
    return digest(source) % 10 == 0


def shown(
    folder: Path, name: str, tokenizer: data.Tokenizer, *, sequence: int, answers: int
) -> list[Row]:
    """The public rows of a task, see `public`. Arguments and errors as of `load`."""
    directory, _ = FILES.get(name, ("xsum_superni", "test"))
    fitter, room = Fitter(tokenizer), sequence - answers
    made = [MAKERS[name](fitter, row, room) for row in read(folder / directory / "train.jsonl.gz")]
    return [m.row for m in _distinct(made) if public(m.source)]


def _asked(fitter: Fitter, text: str, after: str, room: int, keep: str = "start") -> str:
    """`Text: ...` and what follows it, in at most `room` tokens."""
    left = room - fitter.count("Text:") - fitter.count(after)
    if left < ROOM:
        raise TaskError(f"{room} tokens hold {left} of the text before {after!r}; at least {ROOM}")
    body = fitter.start(text, left) if keep == "start" else fitter.end(text, left)
    return f"Text: {body}{after}"


def _agnews(fitter: Fitter, row: dict[str, Any], room: int) -> _Made:
    prompt = _asked(fitter, row["text"], "\nTopic:", room)
    return _Made(Row(prompt, AGNEWS[int(row["label"])]), " ".join(row["text"].split()))


def _squad(fitter: Fitter, row: dict[str, Any], room: int) -> _Made:
    context, answer = row["context"], row["answers"]["text"][0]
    at = int(row["answers"]["answer_start"][0])
    frame = fitter.count("Text:") + fitter.count("\nQuestion:") + fitter.count("\nAnswer:")
    question = fitter.start(row["question"], (room - frame) // 2)
    left = room - frame - int(fitter.sizes(question.split()).sum())
    if left < ROOM:
        raise TaskError(f"{room} tokens hold {left} of a paragraph beside its question")
    spans = [match.span() for match in re.finditer(r"\S+", context)]
    words = [context[start:stop] for start, stop in spans]
    ends = np.array([stop for _, stop in spans])
    first = int(np.searchsorted(ends, at, side="right"))
    last = int(np.searchsorted(ends, at + len(answer.rstrip()) - 1, side="right"))
    if not 0 <= first <= last < len(words):
        raise TaskError(
            f"squad: {answer[:40]!r} at {at} found, a place in {len(context)} characters"
        )
    share = digest(row["question"] + context) / 2**64
    start, stop = around(fitter.sizes(words), first, last, left, share)
    prompt = f"Text: {' '.join(words[start:stop])}\nQuestion: {question}\nAnswer:"
    return _Made(Row(prompt, " ".join(answer.split())), context)


def _xsum(fitter: Fitter, row: dict[str, Any], room: int) -> _Made:
    after = "\nInstruction: Summarize in one sentence.\nResponse:"
    prompt = _asked(fitter, row["document"], after, room)
    return _Made(Row(prompt, " ".join(row["summary"].split())), row["document"])


def _superni(fitter: Fitter, row: dict[str, Any], room: int) -> _Made:
    how = SUPERNI[row["task"]]
    after = f"\nInstruction: {how.words}\nResponse:"
    prompt = _asked(fitter, row["input"], after, room, how.keep)
    return _Made(Row(prompt, " ".join(row["output"].split())), row["input"])


def _distinct(made: Iterable[_Made], taken: Iterable[_Made] = ()) -> list[_Made]:
    """The first row of each prompt, but none with a prompt or source that is `taken`."""
    prompts = {m.row.text for m in taken}
    sources = {m.source for m in taken}
    kept: dict[str, _Made] = {}
    for m in made:
        if m.row.text not in prompts and m.source not in sources:
            kept.setdefault(m.row.text, m)
    return list(kept.values())


def pick(made: Sequence[_Made], count: int, labels: Sequence[str]) -> list[_Made]:
    """About `count` rows by the hash of their source, as many of each label; all rows of a source or none.

    With `count` rows or fewer: all of them, balanced or not.
    """
    order = sorted(made, key=lambda m: (digest(m.source), m.row.text))
    if count >= len(order):
        return order
    if labels:
        each = min(count // len(labels), min(sum(m.row.label == x for m in made) for x in labels))
        return [m for x in labels for m in [m for m in order if m.row.label == x][:each]]
    while 0 < count < len(order) and order[count].source == order[count - 1].source:
        count += 1
    return order[:count]


FILES = {"agnews": ("agnews", "test"), "squad": ("squad_subset", "validation")}
MAKERS: dict[str, Maker] = {"agnews": _agnews, "squad": _squad, "xsum": _xsum}


def load(
    folder: Path,
    name: str,
    tokenizer: data.Tokenizer,
    *,
    sequence: int,
    answers: int,
    validation: int = 400,
    test: int = 1000,
) -> TaskData:
    """Read one task.

    Parameters
    ----------
    folder : Path
        Holds agnews/, squad_subset/, xsum_superni/, superni_mix/.
    name : str
        One of `NAMES`.
    sequence, answers : int
        Tokens of a row and its answer positions: prompts have at most `sequence - answers` tokens.
    validation, test : int
        Rows at most; at most a fifth of the training file becomes validation rows. Balanced over the labels.

    Raises
    ------
    TaskError
        Unknown name, no such file, not JSON lines, a sequence that is too short.
    """
    if name not in NAMES:
        raise TaskError(f"no task {name!r}; known: {', '.join(NAMES)}")
    full = next((task for task in SUPERNI if short(task) == name), None)
    if full is not None:
        files, maker = ("superni_mix", "test"), _superni
    else:
        files, maker = FILES.get(name, ("xsum_superni", "test")), MAKERS[name]
    fitter, room = Fitter(tokenizer), sequence - answers

    def made(part: str) -> list[_Made]:
        path = folder / files[0] / f"{part}.jsonl.gz"
        try:
            rows = [r for r in read(path) if full is None or r["task"] == full]
            return [maker(fitter, row, room) for row in rows]
        except (KeyError, IndexError, TypeError) as error:
            raise TaskError(f"{path}: a row that cannot be used: {error!r}") from error

    tested = _distinct(made(files[1]))
    rest = [m for m in _distinct(made("train"), tested) if not public(m.source)]
    metric: Metric = SUPERNI[full].metric if full else _metric(name)
    labels = tuple(sorted({str(m.row.label) for m in rest})) if metric == "accuracy" else ()
    labels = AGNEWS if name == "agnews" else labels
    if labels and data.verbalise(labels, tokenizer, answers).codes:
        raise TaskError(f"{name}: two of the labels {', '.join(labels)} begin with the same token")
    apart = pick(rest, min(validation, len(rest) // 5), labels)
    train = _distinct(rest, apart)
    return TaskData(
        name=name,
        metric=metric,
        labels=labels,
        train=tuple(m.row for m in train),
        groups=tuple(_groups(name, train, labels)),
        validation=tuple(m.row for m in apart),
        test=tuple(m.row for m in pick(tested, test, labels)),
    )


def _metric(name: str) -> Metric:
    return {"agnews": "accuracy", "squad": "f1"}.get(name, "rouge2")  # type: ignore[return-value]


def _groups(name: str, rows: Sequence[_Made], labels: Sequence[str]) -> list[str]:
    """Label, or topic of the paragraph or document (titles are there for a third of squad's rows only)."""
    if labels:
        return [str(m.row.label) for m in rows]
    if name not in ("squad", "xsum"):
        return [name] * len(rows)
    sources = sorted({m.source for m in rows})
    topic = dict(zip(sources, topics(sources, HALVINGS), strict=True))
    return [topic[m.source] for m in rows]


def heldout_text(
    folder: Path, tokenizer: Any, *, windows: int = 64, length: int = 64
) -> NDArray[np.int64]:
    """Text on which forgetting is measured: what the base never saw, of the kinds that it learned.

    Evenly spaced windows over the held-out parts of the four pretraining domains, as many of each. Paragraphs of SQuAD
    with their questions are left out: they are the squad task's own test rows.

    Returns
    -------
    int64 [windows, length] : tokens, the same at every call

    Raises
    ------
    TaskError
        A file is missing.
    """
    try:
        _, held = corpus.documents(folder)
    except FileNotFoundError as error:
        raise TaskError(
            f"{error.filename}: no such file; held-out text needs the pretraining text"
        ) from error
    found = []
    for number, domain in enumerate(corpus.DOMAINS):
        texts = [t for t in held[domain] if domain != "encyclopedia" or "\nQuestion: " not in t]
        stream = corpus.encode(tokenizer, texts).astype(np.int64)
        each = windows // len(corpus.DOMAINS) + (number < windows % len(corpus.DOMAINS))
        for start in np.linspace(0, len(stream) - length, each).astype(int):
            found.append(stream[start : start + length])
    return np.stack(found)

"""What one run's answers are worth, row by row: accuracy, SQuAD F1, ROUGE-2, answer loss. Pure.

Letters: N rows, K answer positions, V vocabulary, C labels. Every score of a row is a share in [0, 1], but the loss.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge import data
from edge.data import Row


def said(tokenizer: data.Tokenizer, tokens: Sequence[int], end: int | None) -> str:
    """The text of generated tokens up to the end token, without white space around it."""
    kept = [int(t) for t in tokens]
    if end is not None and end in kept:
        kept = kept[: kept.index(end)]
    return tokenizer.decode(kept).strip()


def label_numbers(rows: Sequence[Row], labels: Sequence[str]) -> NDArray[np.int64]:
    """The place of each row's label in `labels`, [N]; raises ValueError for another label."""
    place = {label: number for number, label in enumerate(labels)}
    try:
        return np.array([place[str(row.label)] for row in rows], dtype=np.int64)
    except KeyError as error:
        raise ValueError(f"label {error} found, one of {', '.join(labels)} wanted") from error


def right(logits: ArrayLike, first: ArrayLike, numbers: ArrayLike) -> NDArray[np.bool_]:
    """Is the label whose first token is the likeliest of all labels' the row's own?

    Parameters
    ----------
    logits : float [N, V]
        At the first answer position.
    first : int [C]
        First token of each label, all different (`edge.data.verbalise(...).first`).
    numbers : int [N]
        The right label of each row.

    Examples
    --------
    >>> right([[0.0, 9.0, 1.0, 2.0], [0.0, 9.0, 2.0, 1.0]], [2, 3], [1, 1])
    array([ True, False])
    """
    return np.asarray(logits)[:, np.asarray(first)].argmax(-1) == np.asarray(numbers)


def answer_losses(
    logits: NDArray[np.floating], targets: NDArray[np.integer], weights: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Negative log-likelihood of each row's answer, and the number of its tokens.

    Parameters
    ----------
    logits : float [N, K, V]
    targets : int [N, K]
    weights : float [N, K]
        1 where there is an answer token.

    Returns
    -------
    (sums [N] in nats, tokens [N]) : the answer loss of any set of rows is `sums.sum() / tokens.sum()`

    Examples
    --------
    >>> sums, tokens = answer_losses(np.zeros((1, 2, 4)), np.array([[1, 2]]), np.array([[1, 0]]))
    >>> float(sums[0] / np.log(4)), tokens
    (1.0, array([1.]))
    """
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    picked = np.take_along_axis(shifted, np.asarray(targets)[..., None], -1)[..., 0]
    losses = np.log(np.exp(shifted).sum(-1)) - picked
    return (losses * weights).sum(-1), np.asarray(weights, np.float64).sum(-1)


def normalised(answer: str) -> list[str]:
    """Words of an answer as SQuAD's evaluation counts them: lower case, no ASCII punctuation, no articles.

    The order is the official one (evaluate-v1.1.py): an article that punctuation joined to a word stays.

    >>> normalised("The U.S.'s  a-bomb, an end!")
    ['uss', 'abomb', 'end']
    """
    text = "".join(c for c in answer.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(found: Counter[object], wanted: Counter[object]) -> float:
    common = (found & wanted).total()
    if common == 0:
        return 0.0
    precision, recall = common / found.total(), common / wanted.total()
    return 2 * precision * recall / (precision + recall)


def squad_f1(found: str, wanted: str) -> float:
    """F1 over words, each as often as it occurs (SQuAD, arXiv 1606.05250).

    Where nothing is left of an answer by normalisation, 1 if nothing is left of the other, else 0 (evaluate-v2.0.py).

    >>> squad_f1("in the year 1999", "1999")
    0.5
    """
    one, two = normalised(found), normalised(wanted)
    if not one or not two:
        return float(one == two)
    return _f1(Counter(one), Counter(two))


def rouge_2(found: str, wanted: str) -> float:
    """F1 over pairs of neighbouring words, each as often as it occurs (ROUGE-2 without stemming; Lin, 2004).

    Words are runs of a-z and 0-9 in lower case, as in Google's rouge-score. 0 where a text has fewer than two words.

    >>> rouge_2("the cat sat", "The cat sat down.")
    0.8
    """

    def pairs(text: str) -> Counter[object]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        return Counter(zip(words, words[1:], strict=False))

    return _f1(pairs(found), pairs(wanted))


TEXT_METRICS = {"f1": squad_f1, "rouge2": rouge_2}


def text_scores(metric: str, found: Sequence[str], wanted: Sequence[str]) -> NDArray[np.float64]:
    """The score of each generated answer against the whole answer, [N]; `metric` is a key of `TEXT_METRICS`."""
    measure = TEXT_METRICS[metric]
    return np.array([measure(f, w) for f, w in zip(found, wanted, strict=True)], dtype=np.float64)


def packed(right: ArrayLike) -> str:
    """Right and wrong rows as hexadecimal digits, eight rows in two, for a run's JSON lines.

    >>> packed([True, False, False, False, False, False, False, True, True])
    '8180'
    """
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()

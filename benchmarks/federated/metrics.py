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

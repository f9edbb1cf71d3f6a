"""Topics of texts without labels, so that clients can differ in what they are about: principal directions. Pure.

Letters: N texts, F hashed words.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FEATURES = 2048
COMMON = 0.2  # words in more than this share of the texts tell nothing
ITERATIONS = 30


def vectors(texts: Sequence[str], features: int = FEATURES) -> NDArray[np.float32]:
    """TF-IDF over hashed words of four letters or more, rows of length 1 (or 0), [N, F]."""
    place: dict[str, int] = {}
    found = np.zeros((len(texts), features), np.float32)
    for row, text in enumerate(texts):
        for word, count in Counter(re.findall(r"[a-z]{4,}", text.lower())).items():
            if word not in place:
                place[word] = zlib.crc32(word.encode()) % features
            found[row, place[word]] += count
    share = (found > 0).mean(0)
    weight = np.where((share > 0) & (share <= COMMON), -np.log(np.maximum(share, 1e-9)), 0.0)
    found = np.log1p(found) * weight.astype(np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def direction(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Coordinate of each point [N, F] on the first principal axis, by power iteration, [N]."""
    centred = points - points.mean(0)
    axis = np.ones(points.shape[1], np.float32)
    for _ in range(ITERATIONS):
        axis = centred.T @ (centred @ axis)
        axis /= max(float(np.linalg.norm(axis)), 1e-20)
    return centred @ axis


def topics(texts: Sequence[str], halvings: int) -> list[str]:
    """The topic of each text, "topic 0" to "topic 2^halvings - 1", the same at every call.

    The texts are halved at the median of their first principal axis, and each half again: topics of equal size (by one
    or two), so that none is too rare to be a client's. Coarse topics, with borders in the middle of things.
    """
    if not texts:
        return []
    points = vectors(texts)
    found = np.zeros(len(texts), dtype=np.int64)
    for _ in range(halvings):
        split = np.zeros_like(found)
        for topic in np.unique(found):
            here = np.flatnonzero(found == topic)
            order = np.argsort(direction(points[here]), kind="stable")
            split[here[order[len(here) // 2 :]]] = 1
        found = 2 * found + split
    return [f"topic {topic}" for topic in found]

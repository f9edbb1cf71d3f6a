"""What a table of counts can do: the unigram and trigram models that the reference base is measured against.

Letters: V vocabulary, N tokens. Both models are fitted on token ids and give natural-log probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


def unigram(tokens: NDArray[Any], vocabulary: int) -> Floats:
    """Log probability of each token by its frequency, one added to every count; [V].

    >>> np.exp(unigram(np.array([0, 0, 1]), 3)).round(3).tolist()
    [0.5, 0.333, 0.167]
    """
    counts = np.bincount(tokens.astype(np.int64), minlength=vocabulary) + 1
    return np.asarray(np.log(counts / counts.sum()))


@dataclass(frozen=True)
class _Level:
    """Discounted counts of one order: sorted keys `context * V + token`, and per context its total and its types."""

    keys: Ids
    counts: Ids
    contexts: Ids
    totals: Ids
    types: Ids
    discount: float
    vocabulary: int

    @classmethod
    def of(cls, keys: Ids, counts: Ids, discount: float | None, vocabulary: int) -> _Level:
        contexts, start = np.unique(keys // vocabulary, return_index=True)
        if discount is None:
            once, twice = int((counts == 1).sum()), int((counts == 2).sum())
            # Ney, Essen & Kneser 1994; kept away from 0 and 1, where a tiny text would put it.
            discount = float(np.clip(once / max(1, once + 2 * twice), 0.1, 0.95))
        totals = np.add.reduceat(counts, start)
        types = np.diff(np.append(start, len(keys)))
        return cls(keys, counts, contexts, totals, types, discount, vocabulary)

    def mix(self, context: Ids, token: Ids, lower: Floats) -> Floats:
        """Probability of `token` after `context`, with what the discount frees going to `lower`; all [N]."""
        seat = np.minimum(np.searchsorted(self.contexts, context), len(self.contexts) - 1)
        key = context * self.vocabulary + token
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        count = np.where(self.keys[place] == key, self.counts[place], 0)
        total = self.totals[seat].astype(np.float64)
        kept = np.maximum(count - self.discount, 0) / total
        freed = self.discount * self.types[seat] / total
        return np.where(self.contexts[seat] == context, kept + freed * lower, lower)


@dataclass(frozen=True)
class Trigram:
    """Interpolated Kneser-Ney (Chen & Goodman 1999, section 2.7), one discount per order."""

    three: _Level
    two: _Level
    one: _Level
    vocabulary: int

    @classmethod
    def fit(cls, tokens: NDArray[Any], vocabulary: int, discount: float | None = None) -> Trigram:
        """Count `tokens` [N], N >= 3; `discount` None estimates one per order from the counts of counts."""
        t = tokens.astype(np.int64)
        v = vocabulary
        keys, counts = np.unique((t[:-2] * v + t[1:-1]) * v + t[2:], return_counts=True)
        # The lower orders count in how many contexts something was seen, not how often: Kneser and Ney's idea.
        pairs, pair_counts = np.unique(keys % (v * v), return_counts=True)
        singles, single_counts = np.unique(pairs % v, return_counts=True)
        return cls(
            _Level.of(keys, counts, discount, v),
            _Level.of(pairs, pair_counts, discount, v),
            _Level.of(singles, single_counts, discount, v),
            v,
        )

    def log_probabilities(self, tokens: NDArray[Any]) -> Floats:
        """Of every token but the first two, given the two before it; [N - 2]."""
        t = tokens.astype(np.int64)
        first, second, third = t[:-2], t[1:-1], t[2:]
        uniform = np.full(len(third), 1 / self.vocabulary)
        one = self.one.mix(np.zeros_like(third), third, uniform)
        two = self.two.mix(second, third, one)
        three = self.three.mix(first * self.vocabulary + second, third, two)
        return np.asarray(np.log(three))

"""Text cut to a number of tokens at word borders: from its start, its end, or around an answer. Pure.

Letters: W words of a text.

A byte-level BPE splits at white space before it merges, so that the tokens of a text are those of its words one by
one, each with the space in front of it; their counts add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge import data


class Fitter:
    """Counts the tokens of words, each once, and cuts texts to a room."""

    def __init__(self, tokenizer: data.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def sizes(self, words: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of each word with a space in front, [W]."""
        for word in words:
            if word not in self._known:
                self._known[word] = len(data.encode(self.tokenizer, " " + word))
        return np.array([self._known[word] for word in words], dtype=np.int64)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(data.encode(self.tokenizer, text))

    def start(self, text: str, room: int) -> str:
        """As many of the first words as `room` tokens hold."""
        words = text.split()
        kept = int(np.searchsorted(np.cumsum(self.sizes(words)), room, side="right"))
        return " ".join(words[:kept])

    def end(self, text: str, room: int) -> str:
        """As many of the last words as `room` tokens hold."""
        words = text.split()
        kept = int(np.searchsorted(np.cumsum(self.sizes(words)[::-1]), room, side="right"))
        return " ".join(words[len(words) - kept :])


def around(
    sizes: NDArray[np.int64], first: int, last: int, room: int, share: float
) -> tuple[int, int]:
    """A window of words that holds an answer.

    Parameters
    ----------
    sizes : int [W]
        Tokens of each word.
    first, last : int
        First and last word of the answer.
    room : int
        Tokens that the window may have.
    share : float in [0, 1]
        How much of what the answer leaves lies before it; what one side has no words for goes to the other.

    Returns
    -------
    (start, stop) : words [start, stop); of an answer longer than the room, its beginning

    Examples
    --------
    >>> around(np.ones(9, int), 4, 4, 5, 0.0), around(np.ones(9, int), 4, 4, 5, 1.0)
    ((4, 9), (0, 5))
    >>> around(np.ones(9, int), 1, 1, 5, 1.0)
    (0, 5)
    """
    start, stop, spare = first, first, room
    while stop <= last and sizes[stop] <= spare:
        spare -= sizes[stop]
        stop += 1
    if stop <= last:
        return start, stop
    after = spare - int(share * spare)

    def back(start: int, spare: int) -> tuple[int, int]:
        while start > 0 and sizes[start - 1] <= spare:
            start -= 1
            spare -= int(sizes[start])
        return start, spare

    start, left = back(start, spare - after)
    left += after
    while stop < len(sizes) and sizes[stop] <= left:
        left -= sizes[stop]
        stop += 1
    start, _ = back(start, int(left))
    return start, stop

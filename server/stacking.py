"""FLoRA (arXiv 2409.05976): factors of all devices laid side by side, exact for any ranks, then merged into weights.

The rank of the adapter is the sum of the ranks for one moment: the product goes into the weights and every device
starts from fresh factors in the next round. That takes weights that can be changed. A device's 4-bit experts cannot
hold small changes, and the blobs of a store are quantised and addressed by their content, so a running server refuses
the rule; simulations keep the sum of the products beside the weights, as `absorb` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import numpy as np

from protocol import lora, names
from server.contribution import Key
from server.lora_rules import Array, Factors, terms

Dense = MutableMapping[tuple[int, int, str], Array]
"""(layer, expert, projection) -> change to the weight, [O, I]; an absent one is zero."""


def stack(old_a: Array, old_b: Array, holders: Sequence[Factors]) -> tuple[Array, Array]:
    """Factors laid side by side, shares in B: B A is the average of the products exactly.

    Parameters
    ----------
    old_a, old_b : [R, I] and [O, R]; what stays of their product is part of the stack
    holders : (A [r, I], B [O, r], share)

    Returns
    -------
    A [n, I], B [O, n]; n is the sum of the ranks

    Examples
    --------
    >>> one, two = (np.ones((1, 2)), np.ones((1, 1)), 0.5), (np.eye(2), np.ones((1, 2)), 0.5)
    >>> a, b = stack(np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float32), [one, two])
    >>> a.shape, (b @ a).tolist()
    ((3, 2), [[1.0, 1.0]])
    """
    left, right = terms(old_a, old_b, holders)
    return (
        np.concatenate(right, axis=0).astype(np.float32),
        np.concatenate(left, axis=1).astype(np.float32),
    )


def absorb(
    adapter: Mapping[str, Array],
    keys: Iterable[Key],
    projections: Sequence[str],
    dense: Dense,
    *,
    rank: int,
    round: int,
) -> dict[str, Array]:
    """Move the products of these experts, with LoRA's scale, into `dense` (in place); leave fresh factors behind.

    Parameters
    ----------
    adapter : after `aggregate` under "stack"
    keys : the experts that were trained, `Aggregated.holders`
    rank : of the fresh factors
    round : they are drawn anew in every round, as in FLoRA

    Returns
    -------
    The adapter of the next round: `weights + dense` with it is the same model.

    Examples
    --------
    >>> stacked = {
    ...     "layers.0.experts.1.down.lora_A": np.ones((3, 2), np.float32),
    ...     "layers.0.experts.1.down.lora_B": np.ones((1, 3), np.float32),
    ... }
    >>> dense = {}
    >>> after = absorb(stacked, [(0, 1)], ("down",), dense, rank=1, round=1)
    >>> dense[0, 1, "down"].tolist(), {name.rsplit(".")[-1]: a.shape for name, a in after.items()}
    ([[6.0, 6.0]], {'lora_A': (1, 2), 'lora_B': (1, 1)})
    """
    new = dict(adapter)
    for layer, expert in keys:
        for projection in projections:
            key_a, key_b = (names.lora(layer, expert, projection, f) for f in names.FACTORS)
            a, b = adapter[key_a], adapter[key_b]
            change = lora.delta(a, b)
            place = layer, expert, projection
            dense[place] = change if place not in dense else dense[place] + change
            new[key_a] = lora.fresh_a(f"{key_a} round {round}", rank, a.shape[1])
            new[key_b] = np.zeros((b.shape[0], rank), np.float32)
    return new

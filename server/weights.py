"""Who counts for an expert, and how much. Pure.

A device's weight for an expert is a_k = |D_k| (n_k / N_k)^t (1 + age)^-s; its share is a_k / (a_0 + sum a), where the
prior mass a_0 stands for the old value. Shares and the old value's share sum to 1. The update is a ratio of two sums,
so it is as large for an expert that few hold as for one that all hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol import names
from server.contribution import Contribution, Key
from server.rules import Rules

Members = list[tuple[Contribution, float]]


def data_size(c: Contribution, rules: Rules) -> float:
    """|D_k| (1 + age)^-s.

    >>> c = Contribution(device="a", tensors={}, trained_tokens={}, tokens=10, rows=4, age=3)
    >>> data_size(c, Rules()), data_size(c, Rules(weighting="rows"))
    (5.0, 2.0)
    """
    size = c.rows if rules.weighting == "rows" else _tokens(c)
    return size * freshness(c, rules)


def freshness(c: Contribution, rules: Rules) -> float:
    """(1 + age)^-s."""
    return float((1.0 + max(c.age, 0)) ** -rules.staleness)


def _tokens(c: Contribution) -> float:
    return max([c.tokens, *c.trained_tokens.values()])


def expert_weight(c: Contribution, key: Key, rules: Rules) -> float:
    """a_k of one expert, 0 for a device that does not count for it.

    >>> c = Contribution(device="a", tensors={}, trained_tokens={(0, 1): 2.0}, tokens=8, rows=10)
    >>> [expert_weight(c, (0, 1), Rules(temperature=t)) for t in (0, 1, 2)]
    [8.0, 2.0, 0.5]
    >>> expert_weight(c, (0, 1), Rules(tau=0.1)), expert_weight(c, (0, 2), Rules())
    (0.0, 0.0)
    """
    if rules.tau > 0 and c.usage.get(key, 0.0) < rules.tau:
        return 0.0
    if rules.members != "trained":
        return data_size(c, rules)
    trained, tokens, t = c.trained_tokens.get(key, 0.0), _tokens(c), rules.temperature
    if trained <= 0:
        return 0.0
    if rules.weighting == "rows":
        return float(c.rows * (trained / tokens) ** t) * freshness(c, rules)
    # N (n/N)^t, with the powers taken apart so that t = 1 gives n exactly.
    return float(tokens ** (1.0 - t) * trained**t) * freshness(c, rules)


def sent(c: Contribution) -> set[Key]:
    """Experts of which the device sent anything."""
    parsed = (names.parse(name) for name in c.tensors)
    return {(name.layer, name.expert) for name in parsed if name is not None}


def shares(contributions: Sequence[Contribution], rules: Rules) -> tuple[dict[Key, Members], float]:
    """Holders of every expert that anyone counts for, with their shares.

    Returns
    -------
    shares : (layer, expert) -> [(contribution, share > 0)] in the order of `contributions`; what is missing to a sum of
        1 belongs to the old value. A lone holder under `copy_single` has share 1
    prior_mass : a_0
    """
    masses: dict[Key, Members] = {}
    for c in contributions:
        candidates = set(c.trained_tokens) if rules.members == "trained" else sent(c)
        for key in sorted(candidates):
            weight = expert_weight(c, key, rules)
            if weight > 0:
                masses.setdefault(key, []).append((c, weight))
    if not masses:
        return {}, 0.0
    totals = {key: sum(w for _, w in masses[key]) for key in sorted(masses)}
    if rules.members == "all":
        everyone = sum(data_size(c, rules) for c in contributions)
        totals = dict.fromkeys(totals, everyone)
    prior = rules.prior * float(np.median(list(totals.values())))
    found: dict[Key, Members] = {}
    for key in sorted(masses):
        members = masses[key]
        if rules.copy_single and len(members) == 1:
            found[key] = [(members[0][0], 1.0)]
        else:
            found[key] = [(c, w / (prior + totals[key])) for c, w in members]
    return found, prior

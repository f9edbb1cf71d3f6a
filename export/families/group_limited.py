"""Routing to the experts of a few groups only, as DeepSeek does: a resident expert keeps the group it has in the base.

Letters: T tokens, P slots, E experts, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from export.families.family import Config

ABSENT = -1e30  # below every score, and finite


def one_hot(config: Config) -> dict[str, Tensor]:
    """`group` [E, G]: 1 where the expert is of the group; nothing when there is one group only."""
    groups, experts = config["n_group"] or 1, config["n_routed_experts"]
    if groups == 1:
        return {}
    return {"group": torch.eye(groups).repeat_interleave(experts // groups, 0)}


@torch.no_grad()
def allowed(score: Tensor, group: Tensor, best: int, chosen: int) -> Tensor:
    """Which slots belong to a token's chosen groups.

    Parameters
    ----------
    score : [T, P]
    group : [P, G], one-hot
    best : a group's score is the mean of that many of its residents' best scores, or of as many as it has: in the whole
        model, where every group has enough, the same order as DeepSeek's sum
    chosen : groups per token; one without residents is never preferred

    Returns
    -------
    float [T, P], 1 or 0

    Examples
    --------
    >>> allowed(torch.tensor([[1.0, 4.0, 3.0]]), torch.tensor([[1.0, 0], [1, 0], [0, 1]]), 2, 1).tolist()
    [[0.0, 0.0, 1.0]]
    """
    slots, groups = group.shape
    by_group = torch.where(group.t().unsqueeze(0) > 0, score.unsqueeze(1), ABSENT)  # [T, G, P]
    top = torch.topk(by_group, min(best, slots), -1).values
    there = top > ABSENT / 2
    count = there.to(score.dtype).sum(-1)
    mean = torch.where(there, top, 0.0).sum(-1) / count.clamp(min=1.0)
    mean = torch.where(count > 0, mean, ABSENT)
    index = torch.topk(mean, min(chosen, groups), -1).indices
    picked = (index.unsqueeze(-1) == torch.arange(groups)).to(score.dtype).sum(-2)  # [T, G]
    return torch.mm(picked, group.t())

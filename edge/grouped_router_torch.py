"""DeepSeek's group-limited router over the resident experts, as the slow reference: one token at a time.

transformers' own router needs groups of equal size, which residents do not form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class GroupedRouter(nn.Module):  # type: ignore[misc]
    """Stands in for the router of a DeepSeek-V2 or V3 block.

    Parameters
    ----------
    config : the model's configuration
    rows : [P, d], router rows of the residents
    group : [P, G], 1 where the resident is of the group
    bias : [P], added to choose but not to weigh (V3); None for V2, whose scores are a softmax
    """

    def __init__(
        self, config: Any, rows: torch.Tensor, group: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.config = config
        self.rows(group, bias)

    def rows(self, group: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Groups and biases of the rows that `weight` has."""
        self.bias = bias
        self.groups = [column.nonzero()[:, 0].tolist() for column in group.T]

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [T, P], weights [T, k], slots [T, k]."""
        logits = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        score = logits.softmax(-1) if self.bias is None else logits.sigmoid()
        index, there = [], []
        for row in score.detach():
            chosen = self._choose(row)
            spare = [slot for slot in range(score.shape[1]) if slot not in chosen]
            spare = spare[: self.config.num_experts_per_tok - len(chosen)]
            index.append(chosen + spare)
            there.append([1.0] * len(chosen) + [0.0] * len(spare))
        slots = torch.tensor(index)
        weight = score.gather(1, slots) * torch.tensor(there)
        if self.bias is not None and self.config.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        return logits, weight * self.config.routed_scaling_factor, slots

    def _choose(self, score: torch.Tensor) -> list[int]:
        """Slots of one token: at most k, from its best groups."""
        choice = (score if self.bias is None else score + self.bias).tolist()
        best = 1 if self.bias is None else 2
        value = {}
        for number, members in enumerate(self.groups):
            top = sorted((choice[slot] for slot in members), reverse=True)[:best]
            if top:
                value[number] = sum(top) / len(top)
        chosen = sorted(value, key=lambda group: -value[group])[: self.config.topk_group]
        allowed = [slot for group in chosen for slot in self.groups[group]]
        return sorted(allowed, key=lambda slot: -choice[slot])[: self.config.num_experts_per_tok]

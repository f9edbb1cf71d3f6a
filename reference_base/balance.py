"""Auxiliary losses of the router, per layer. Transformers' own pools all layers, so an expert may be dead in one layer
as long as its namesake in another is busy; and nothing in it makes domains route differently.

Letters: L layers, T tokens, E experts, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balance(logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch's load-balancing loss per layer, mean over layers; 1 when even. `logits`: L times [T, E]."""
    total = logits[0].new_zeros((), dtype=torch.float32)
    for layer in logits:
        g = layer.float().softmax(-1)
        experts = g.shape[-1]
        chosen = torch.bincount(g.topk(top_k, -1).indices.flatten(), minlength=experts)
        total = total + experts * (chosen / chosen.sum() * g.mean(0)).sum()
    return total / len(logits)


def information(logits: tuple[Tensor, ...], domain: Tensor) -> Tensor:
    """I(domain; expert) in nats, mean over layers (Mod-Squad, Chen et al. 2023). `domain` [T] holds 0..D-1.

    Domains weigh alike whatever their share of the batch; a domain absent from the batch does not count.
    """
    present = torch.nn.functional.one_hot(domain).float()
    present = present[:, present.sum(0) > 0]
    share = present / present.sum(0)  # [T, D], columns sum to 1
    total = logits[0].new_zeros((), dtype=torch.float32)
    for layer in logits:
        profile = share.T @ layer.float().softmax(-1)  # [D, E]
        mean = profile.mean(0, keepdim=True)
        total = (
            total
            + (profile * (profile.clamp_min(1e-9) / mean.clamp_min(1e-9)).log()).sum(-1).mean()
        )
    return total / len(logits)

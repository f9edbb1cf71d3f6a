"""The adapter experts of one layer (FFT-MoE, see `families/fft_moe.py`) as plain matrix products.

Letters: T tokens, P slots, k experts per token, d hidden, h_p width of slot p, H sum of the widths.

These experts are so small that all residents are computed for every token in two products over their stacked factors;
those a token was not routed to are multiplied by 0, which also gives them no gradient from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def activate(x: Tensor) -> Tensor:
    """SiLU, written out: its own backward is not in ExecuTorch's operator set."""
    return x * torch.sigmoid(x)


def slot_weights(weight: Tensor, slot: Tensor, slots: int) -> Tensor:
    """[T, P]: the routing weight of each slot, 0 where the token was not routed to it.

    Examples
    --------
    >>> slot_weights(torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]]), 3).tolist()
    [[0.25, 0.0, 0.75]]
    """
    chosen = (slot.unsqueeze(-1) == torch.arange(slots)).to(weight.dtype)  # [T, k, P]
    return (chosen * weight.unsqueeze(-1)).sum(1)


def inner(x: Tensor, a: Tensor, widths: Sequence[int]) -> Tensor:
    """[T, H]: activated inner features of all slots; `a` is their lora_A [h_p, d], flat, one after the other."""
    return activate(torch.mm(x, a.view(sum(widths), x.shape[1]).t()))


def outer(b: Tensor, widths: Sequence[int], hidden: int) -> Tensor:
    """[d, H]: the slots' lora_B [d, h_p], which lie flat one after the other, side by side."""
    parts = torch.split(b, [hidden * width for width in widths])
    return torch.cat([p.view(hidden, -1) for p in parts], 1)


def adapter_experts(
    x: Tensor, weight: Tensor, slot: Tensor, a: Tensor, b: Tensor, widths: Sequence[int]
) -> Tensor:
    """Sum over each token's experts of weight * U silu(V x), [T, d].

    Parameters
    ----------
    x : [T, d]
    weight, slot : [T, k]
    a, b : flat factors, see `inner` and `outer`
    widths : h_p of each slot
    """
    of_slot = slot_weights(weight, slot, len(widths))
    # Which slot a column of the inner features belongs to, as one-hot rows.
    owner = torch.tensor([slot for slot, width in enumerate(widths) for _ in range(width)])
    columns = (torch.arange(len(widths)).unsqueeze(1) == owner).to(x.dtype)  # [P, H]
    weighted = inner(x, a, widths) * torch.mm(of_slot, columns)
    return torch.mm(weighted, outer(b, widths, x.shape[1]).t())


def output_norms(x: Tensor, slot: Tensor, a: Tensor, b: Tensor, widths: Sequence[int]) -> Tensor:
    """Norm of each routed expert's output, [T, k]. For statistics only: no gradient is meant to pass."""
    features = torch.split(inner(x, a, widths), list(widths), dim=1)
    out = torch.split(outer(b, widths, x.shape[1]), list(widths), dim=1)
    norms = [torch.mm(f, u.t()).square().sum(-1).sqrt() for f, u in zip(features, out, strict=True)]
    return torch.gather(torch.stack(norms, 1), 1, slot)

"""The terms of a device's local objective in a form that can be exported; their weights are program inputs.

One program serves every objective: a weight of 0 switches a term off, and what it then costs is small, because all of
it is about [T, P] and not about hidden states. Names and meanings of the inputs: `protocol.manifest.Program`.

Letters: T tokens that pass a layer, P slots, k experts per token, N answer positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from protocol.manifest import TensorSpec

INPUTS = (
    "label_smoothing",
    "balance",
    "target_balance",
    "z_loss",
    "cap",
    "cap_backward",
    "active",
)
LOGIT_BIAS = "objective.logit_bias"  # [V]
TARGET = "target"  # of a layer: what mean router probabilities are pulled to
OUT = -1e30  # below every logit, and finite
TINY = 1e-20


def specs(vocabulary: int) -> list[TensorSpec]:
    """The inputs that are the same for all layers, in calling order."""
    one = [TensorSpec(name=f"objective.{name}", shape=(1,), dtype="float32") for name in INPUTS]
    return [*one, TensorSpec(name=LOGIT_BIAS, shape=(vocabulary,), dtype="float32")]


def is_input(name: str) -> bool:
    """Whether an input of a training program belongs to the objective alone.

    >>> [is_input(n) for n in ("objective.cap", "layers.3.target", "targets", "layers.3.router")]
    [True, True, False, False]
    """
    return name.startswith("objective.") or (
        name.startswith("layers.") and name.endswith(f".{TARGET}")
    )


def with_bias(logits: Tensor, bias: Tensor, answers: int) -> Tensor:
    """Logits with a bias on the first answer token of each row (`protocol.objective.Objective.label_prior`).

    Parameters
    ----------
    logits : [B * K, V], the K answer positions of a row one after the other
    bias : [V]
    answers : K

    Examples
    --------
    >>> with_bias(torch.zeros(4, 2), torch.tensor([0.5, -1.0]), 2).tolist()
    [[0.5, -1.0], [0.0, 0.0], [0.5, -1.0], [0.0, 0.0]]
    """
    first = (torch.arange(logits.shape[0]) % answers == 0).to(logits.dtype).unsqueeze(1)
    return logits + first * bias


def answer_losses(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted means over the answer tokens: -log p(target), without gradient, and with smoothed labels.

    Parameters
    ----------
    logits : [N, V]
    targets, weights : [N, 1]
    smoothing : [1], s of (1 - s) * nll + s * mean_v(-log p_v)
    """
    vocabulary = logits.shape[-1]
    log_p = F.log_softmax(logits, -1)
    plain = -torch.gather(log_p.detach(), 1, targets)
    # A gather with a gradient would become a scatter: one-hot rows, with the smoothing put in.
    even = smoothing / vocabulary
    wanted = torch.where(targets == torch.arange(vocabulary), 1.0 - smoothing + even, even)
    smooth = -(log_p * wanted).sum(-1, keepdim=True)
    total = weights.sum().clamp(min=1e-9)
    objective = (smooth * weights).sum() / total
    return (plain * weights).sum() / total, objective


def within_cap(probabilities: Tensor, valid: Tensor, cap: Tensor, top_k: int) -> Tensor:
    """1 for the slots with the largest mass over a batch, at most `cap` but never fewer than `top_k`, [P].

    Parameters
    ----------
    probabilities : [T, P], of the router over all residents
    valid : [T, 1]
    cap : [1]

    Examples
    --------
    >>> p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [1.0, 0.0, 0.0]])
    >>> within_cap(p, torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([2.0]), 1).tolist()
    [1.0, 1.0, 0.0]
    """
    mass = (probabilities.detach() * valid).sum(0)
    return (_ahead(mass.unsqueeze(0)) < cap.clamp(min=float(top_k))).to(torch.float32).squeeze(0)


def most_active(
    weight: Tensor, active: Tensor, *, renormalise: bool
) -> tuple[Tensor, Tensor | None]:
    """A token's `active` [1] largest weights, the others 0, and which these are, both [T, k]; None: all there are.

    With `renormalise` they are scaled up to what all of the token's weights sum to.

    >>> w = torch.tensor([[0.375, 0.125, 0.125]])
    >>> most_active(w, torch.tensor([2.0]), renormalise=True)[0].tolist()
    [[0.46875, 0.15625, 0.0]]
    """
    if weight.shape[1] == 1:
        return weight, None
    counted = (_ahead(weight.detach()) < active.clamp(min=1.0)).to(weight.dtype)
    chosen = weight * counted
    if renormalise:
        whole = weight.detach().sum(-1, keepdim=True)  # the same for every token
        chosen = chosen * (whole / chosen.sum(-1, keepdim=True).clamp(min=TINY))
    return chosen, counted


def _ahead(values: Tensor) -> Tensor:
    """How many values of the same row come before each when they are ordered: larger, or as large and earlier.

    >>> _ahead(torch.tensor([[3.0, 5.0, 3.0]])).tolist()
    [[1.0, 0.0, 2.0]]
    """
    one, other = values.unsqueeze(-1), values.unsqueeze(-2)
    place = torch.arange(values.shape[-1])
    earlier = place.unsqueeze(0) < place.unsqueeze(1)
    before = (other > one) | ((other == one) & earlier)
    return before.to(values.dtype).sum(-1)


def routing_terms(
    logits: Tensor,
    probabilities: Tensor,
    valid: Tensor,
    tokens: Tensor,
    given: Mapping[str, Tensor],
    top_k: int,
) -> Tensor:
    """The weighted terms of one layer: load balance, heterogeneity-aware balance, z-loss; [1].

    Parameters
    ----------
    logits, probabilities : [T, P], of the router over all residents, also over those beyond the cap
    valid : [T, 1]
    tokens : [P], valid tokens sent to each slot; no gradient
    given : the layer's inputs, with the `objective.` ones

    Notes
    -----
    Load balance P * sum_e f_e mean_t g_te (Switch, arXiv 2101.03961), f the share of routed places. Heterogeneity-aware
    (k / P)^(-1/2) * KL(target || mean_t g_t), after FFT-MoE (arXiv 2508.18663), whose formula is not public; k counts
    the active experts. z-loss mean_t logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906).
    """
    slots = logits.shape[1]
    count = valid.sum().clamp(min=1.0)
    mean = (probabilities * valid).sum(0) / count
    balance = slots * (tokens / tokens.sum().clamp(min=1.0) * mean).sum()
    target, k = given[TARGET], given["objective.active"].clamp(1.0, float(top_k))
    distance = torch.log(target.clamp(min=TINY)) - torch.log(mean.clamp(min=TINY))
    aware = (slots / k).sqrt() * (target * distance).sum()
    size = torch.logsumexp(logits, -1, keepdim=True)
    z = (size * size * valid).sum() / count
    return (
        given["objective.balance"] * balance
        + given["objective.target_balance"] * aware
        + given["objective.z_loss"] * z
    )


def removal_change(
    weight: Tensor, gradient: Tensor, slot: Tensor, valid: Tensor, slots: int, *, renormalise: bool
) -> Tensor:
    """Sum over valid tokens of |first-order change of the objective if the expert were removed|, [P].

    With w a token's weight for the expert and dw its gradient: w dw. Where weights are renormalised the token's other
    experts take over: w_e (sum_j w_j dw_j - dw_e) / (1 - w_e) for weights that sum to 1, here for any sum.

    Parameters
    ----------
    weight, gradient, slot : [T, k]
    valid : [T, 1]
    """
    k = weight.shape[1]
    change = weight * gradient
    if renormalise and k > 1:
        place = torch.arange(k)
        others = (place.unsqueeze(0) != place.unsqueeze(1)).to(weight.dtype)
        rest = torch.mm(weight, others)  # what the others weigh: no difference of numbers near 1
        moved = (torch.mm(change, others) - gradient * rest) / rest.clamp(min=TINY)
        change = torch.where(rest > 0, moved * weight, change)
    size = (change.abs() * valid).reshape(-1, 1)
    # Transposed: as the forward pass has it, it would be one node with that and kept until here.
    sent = (torch.arange(slots).unsqueeze(1) == slot.reshape(1, -1)).to(size.dtype)
    return torch.mm(sent, size).squeeze(1)

"""The terms of a local objective in plain torch, for the reference sessions: autograd does the rest.

Written from the definitions and apart from the exported graph, which is held to it. Sums over MoE layers are means over
layers: the weight of a term means the same for a shallow and a deep model.

Letters: T tokens that pass a layer, P residents, k experts per token, N answer positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from edge.session import Terms


@dataclass
class Routed:
    """What one layer did in a forward pass.

    Attributes
    ----------
    valid : [T], 1 where the token counts
    logits, probabilities : [T, P], of the router over all residents, also over those beyond the cap
    kept : slots within the cap, ascending
    slot, weight : [T, k], the routes taken, before the output scale; `weight` has its gradient after a backward pass
    counted : [T, k], 1 for those of a token's routes that are active
    """

    valid: torch.Tensor
    logits: torch.Tensor
    probabilities: torch.Tensor
    kept: torch.Tensor
    slot: torch.Tensor
    weight: torch.Tensor
    counted: torch.Tensor

    def tokens(self) -> torch.Tensor:
        """Valid tokens sent to each slot, [P]."""
        places = F.one_hot(self.slot, self.logits.shape[1]) * self.counted[..., None]
        return (places.sum(1) * self.valid[:, None]).sum(0)


def with_prior(logits: torch.Tensor, bias: NDArray[np.float32]) -> torch.Tensor:
    """Logits [N, V] as a device that knows how often it sees each label has them, see `Objective.label_prior`.

    `bias` [V], 0 for all but labels, moves labels against each other; a common shift gives all of them together back
    what they had. A device with one label then learns neither for nor against it, and still to answer with a
    label at all.

    >>> z = torch.log(torch.tensor([[0.2, 0.2, 0.6]]))
    >>> [round(x, 4) for x in with_prior(z, np.float32([np.log(3), 1e-9, 0])).exp()[0].tolist()]
    [0.3, 0.1, 0.6]
    """
    moves = torch.from_numpy(bias).to(logits.device)
    labels = moves != 0
    raw = logits[:, labels]
    shift = raw.logsumexp(-1, keepdim=True) - (raw + moves[labels]).logsumexp(-1, keepdim=True)
    return logits + torch.where(labels, moves + shift, moves.new_zeros(()))


def with_bias(logits: torch.Tensor, terms: Terms, answers: int) -> torch.Tensor:
    """Logits [B * K, V], with the prior of `Terms.logit_bias` on the first of every K = `answers` rows."""
    if terms.logit_bias is None:
        return logits
    by_row = logits.unflatten(0, (-1, answers))
    first = with_prior(by_row[:, 0], terms.logit_bias)
    return torch.cat([first[:, None], by_row[:, 1:]], 1).flatten(0, 1)


def answer_losses(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted means over the answer tokens: -log p(target), and the same with smoothed labels.

    Parameters
    ----------
    logits : [N, V]
    targets, weights : [N]
    smoothing : s of (1 - s) * nll + s * mean_v(-log p_v)
    """
    share = weights / weights.sum()
    plain = F.cross_entropy(logits, targets, reduction="none")
    if not smoothing:
        loss = (plain * weights).sum() / weights.sum()
        return loss, loss
    smooth = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return (plain.detach() * share).sum(), (smooth * share).sum()


def within_cap(
    probabilities: torch.Tensor, valid: torch.Tensor, cap: int, top_k: int
) -> torch.Tensor:
    """The slots with the largest mass over a batch, at most `cap` but never fewer than `top_k`; ascending.

    >>> p = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.8, 0.1], [1.0, 0.0, 0.0]])
    >>> within_cap(p, torch.tensor([1.0, 1.0, 0.0]), 2, 1).tolist()  # masses 0.6, 1.0, 0.4
    [0, 1]
    """
    mass = (probabilities.detach() * valid[:, None]).sum(0)
    order = mass.sort(dim=0, descending=True, stable=True).indices
    return order[: max(cap, top_k) if cap else None].sort().values


def most_active(
    weight: torch.Tensor, active: int, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's `active` largest weights (0: all), and which these are, both [T, k].

    With `renormalise` they are scaled up to what all of the token's weights sum to.

    >>> most_active(torch.tensor([[0.375, 0.125, 0.125]]), 2, True)[0].tolist()
    [[0.46875, 0.15625, 0.0]]
    """
    counted = torch.ones_like(weight)
    if not active or active >= weight.shape[1]:
        return weight, counted
    order = weight.detach().sort(dim=-1, descending=True, stable=True).indices
    counted = torch.zeros_like(weight).scatter(1, order[:, :active], 1.0)
    chosen = weight * counted
    if renormalise:
        chosen = chosen * weight.sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True)
    return chosen, counted


def load_balance(routed: Routed) -> torch.Tensor:
    """P * sum_e f_e mean_t g_te (Switch, arXiv 2101.03961): f the share of routed places, without gradient; g over the
    residents."""
    tokens, g = routed.tokens(), _mean(routed)
    return len(g) * (tokens / tokens.sum() * g).sum()


def target_balance(routed: Routed, target: torch.Tensor, k: int) -> torch.Tensor:
    """(k / P)^(-1/2) * KL(target || mean_t g_t), after FFT-MoE (arXiv 2508.18663), whose formula is not public.

    Parameters
    ----------
    target : [P], sums to 1
    k : experts that are active per token
    """
    g = _mean(routed)
    there = target > 0
    kl = (target[there] * (target[there].log() - g[there].log())).sum()
    return (k / len(g)) ** -0.5 * kl


def z_loss(routed: Routed) -> torch.Tensor:
    """mean_t logsumexp(router logits over the residents)^2 (ST-MoE, arXiv 2202.08906)."""
    squares = routed.logits.logsumexp(-1).square()
    return (squares * routed.valid).sum() / routed.valid.sum()


def _mean(routed: Routed) -> torch.Tensor:
    """mean_t g_t over the valid tokens, [P]."""
    return (routed.probabilities * routed.valid[:, None]).sum(0) / routed.valid.sum()


def routing_terms(layers: Mapping[int, Routed], terms: Terms, top_k: int) -> torch.Tensor:
    """The weighted terms that depend on routing, mean over layers; a scalar."""
    k = min(terms.active or top_k, top_k)
    total = torch.zeros(())
    for layer, routed in layers.items():
        if terms.balance:
            total = total + terms.balance * load_balance(routed)
        if terms.target_balance:
            slots = routed.logits.shape[1]
            uniform = np.full(slots, 1 / slots, np.float32)
            target = torch.from_numpy(terms.targets.get(layer, uniform))
            total = total + terms.target_balance * target_balance(routed, target, k)
        if terms.z_loss:
            total = total + terms.z_loss * z_loss(routed)
    return total / len(layers)


def removal_change(routed: Routed, renormalise: bool) -> NDArray[np.float32]:
    """Sum over valid tokens of |first-order change of the objective if the expert were removed|, [P].

    With w a token's weight for the expert and dw its gradient: w dw. Where weights are renormalised over two or more
    experts the others take over: w_e (sum_j w_j dw_j - dw_e) / (1 - w_e) for weights that sum to 1.
    """
    weight = routed.weight.detach().double()
    gradient = routed.weight.grad
    gradient = torch.zeros_like(weight) if gradient is None else gradient.double()
    change = weight * gradient
    if renormalise and weight.shape[1] > 1:
        others = weight.sum(-1, keepdim=True) - weight
        alone = others <= 0
        rest = change.sum(-1, keepdim=True) - change - gradient * others
        change = torch.where(alone, change, weight * rest / others.masked_fill(alone, 1.0))
    spread = F.one_hot(routed.slot, routed.logits.shape[1]).double()
    counts = change.abs() * routed.valid.double()[:, None]
    found: NDArray[np.float32] = (spread * counts[..., None]).sum((0, 1)).float().numpy()
    return found

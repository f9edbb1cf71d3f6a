"""The sub-MoE of one layer as a graph: routes only to resident experts, computes only routed tokens, drops none.

Letters: T tokens, P slots, E experts, k experts per token, d hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from export import adapter_experts, local_objective, ops
from export.families.family import Family
from protocol import packing
from protocol.manifest import BaseIndex, Slot


class RoutedExperts(nn.Module):
    """Stands in for a transformers sparse MoE block; all of its weights come from outside.

    `given` is set before each forward, names as in `protocol.manifest.Program` without `layers.l.`, plus `valid` [B, S]
    unless it generates. `seen` is set by it: with `router_all` among the given the statistics; with `objective.cap`,
    which trains, `routed` and `kept` [P], `penalty` [1] (weighted terms of the objective), and the routes behind
    them, `weight` and `slot` [T, k].
    """

    def __init__(
        self, block: nn.Module, family: Family, base: BaseIndex, slots: tuple[Slot, ...]
    ) -> None:
        super().__init__()
        # Not registered: only what is shared by all tokens has parameters there, and they keep their names.
        self.__dict__["block"] = block
        self.family, self.base, self.slots = family, base, slots
        self.given: Mapping[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, d] -> the same shape."""
        x, bound, config = hidden.reshape(-1, hidden.shape[-1]), self.given, self.base.config
        logits = torch.mm(x, (bound["router_rows"] + bound["router"]).t())
        rows = "router_rows."
        extra = {n.removeprefix(rows): t for n, t in bound.items() if n.startswith(rows)}
        if "objective.cap" in bound:
            weight, slot = self._train(logits, extra)
        else:
            weight, slot = self.family.route(logits, extra, config)
        # On the weights, the output scale is a number per route and not one per feature.
        scaled = weight * bound["output_scale"]
        # Who generates keeps nothing for a backward pass either.
        norms = "objective.cap" not in bound
        y, second = self._experts(x, scaled, slot, norms=norms)
        if "router_all" in bound:
            self._statistics(x, weight, slot, second)
        y = y.view(hidden.shape)
        if self.family.shared is not None:
            y = y + self.family.shared(self.block, hidden)
        return y

    def _train(self, logits: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Weights and slots [T, k] as the objective wants them."""
        bound, family, config = self.given, self.family, self.base.config
        valid, top_k = bound["valid"].reshape(-1, 1), self.base.top_k
        g = family.probabilities(logits, config)
        kept = local_objective.within_cap(g, valid, bound["objective.cap"], top_k)
        there = torch.maximum(kept, bound["objective.cap_backward"])
        out = local_objective.OUT
        if "bias" in extra:  # added to the score: it could choose an expert by itself
            extra = extra | {"bias": torch.where(there > 0, extra["bias"], out)}
        weight, slot = family.route(torch.where(there > 0, logits, out), extra, config)
        weight, counted = local_objective.most_active(
            weight, bound["objective.active"], renormalise=family.renormalises(config)
        )
        routed = self._spread(slot, counted).sum(0) * there
        penalty = local_objective.routing_terms(logits, g, valid, routed, bound, top_k)
        self.seen = {
            "routed": routed,
            "kept": kept,
            "penalty": penalty,
            "weight": weight,
            "slot": slot,
        }
        return weight, slot

    def removal_change(self, gradient: Tensor) -> Tensor:
        """`taylor` [P] of the last forward pass, from the gradient of its weights [T, k]."""
        return local_objective.removal_change(
            self.seen["weight"].detach(),
            gradient,
            self.seen["slot"],
            self.given["valid"].reshape(-1, 1),
            len(self.slots),
            renormalise=self.family.renormalises(self.base.config),
        )

    def _experts(
        self, x: Tensor, weight: Tensor, slot: Tensor, *, norms: bool
    ) -> tuple[Tensor, Tensor]:
        """y [T, d], and with `norms` the norm of each routed expert's output [T, k]."""
        bound, widths = self.given, [s.rank for s in self.slots]
        if self.base.projections == ("adapter",):
            factors = bound["adapter.a"], bound["adapter.b"], widths
            y = adapter_experts.adapter_experts(x, weight, slot, *factors)
            return y, adapter_experts.output_norms(x, slot, *factors) if norms else weight
        first, second = self.base.projections
        layer = (
            *(bound[f"{p}.{part}"] for p in (first, second) for part in ("packed", "scale")),
            *(bound[f"{p}.{part}"] for p in (first, second) for part in ("a", "b")),
            [packing.FORMATS.index(s.format) for s in self.slots],
            widths,
            ops.ACTIVATIONS.index(self.family.activation(self.base.config)),
            self.base.intermediate,
            first == "gate_up",
        )
        operators = torch.ops.expertfleet
        run = operators.routed_experts_norms if norms else operators.routed_experts
        y, second_output = run(x, weight, slot, *layer)
        return y, second_output

    def _spread(self, slot: Tensor, counted: Tensor | None = None) -> Tensor:
        """[T * k, P]: 1 where a valid token is sent and, where `counted` [T, k] is given, that route counts."""
        chosen = (slot.reshape(-1, 1) == torch.arange(len(self.slots))).to(torch.float32)
        valid = self.given["valid"].reshape(-1, 1).expand(-1, slot.shape[1])
        valid = valid if counted is None else valid * counted
        return chosen * valid.reshape(-1, 1)

    def _statistics(self, x: Tensor, weight: Tensor, slot: Tensor, norms: Tensor) -> None:
        valid = self.given["valid"].reshape(-1, 1)
        config = self.base.config
        g = self.family.probabilities(torch.mm(x, self.given["router_all"].t()), config)  # [T, E]
        floor = torch.topk(g, self.base.top_k, -1)[0].amin(-1, keepdim=True)
        resident = self.given["resident"].unsqueeze(0)  # [1, E]
        ordered = torch.topk((g * valid).t().contiguous(), -(-len(x) // 100), -1).values
        self.seen = {
            "mass": (g * valid).sum(0),
            "top": (g * (g >= floor).to(torch.float32) * valid).sum(0),
            "g_log_g": (g * torch.log(g + 1e-20) * valid).sum(0),
            "missed": ((1 - (g * resident).sum(-1, keepdim=True)) * valid).sum(0),
            "output_norm": (self._spread(slot) * (weight * norms).reshape(-1, 1)).sum(0),
            "peak": ordered[:, 0],
            "high": ordered[:, -1],
        }

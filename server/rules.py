"""How the updates of a round are combined: every choice of one run in one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from protocol.objective import Objective

Lora = Literal["svd", "flex", "factors", "stack", "ffa", "alternate", "fedsa"]
Gate = Literal["rows", "plain_rows", "importance", "mean", "frozen"]
Members = Literal["trained", "sent", "all"]
Weighting = Literal["tokens", "rows"]
SignConflict = Literal["off", "drop", "scale"]
Robust = Literal["mean", "median", "trimmed"]
_CHOICES = {
    "lora": Lora,
    "gate": Gate,
    "members": Members,
    "weighting": Weighting,
    "sign_conflict": SignConflict,
    "robust": Robust,
}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules of aggregation. The defaults are the running server's own method.

    Attributes
    ----------
    lora : how the factors of an expert are combined
        "svd": products are averaged and projected back to the adapter's rank; a device of lower rank votes for the old
        tail. "flex": the same as FlexLoRA has it (arXiv 2402.11505): what a device does not have counts as zero.
        "factors": A and B are averaged on their own (FedIT, arXiv 2305.05644), which is biased, see `lora_rules.bias`.
        "stack": factors are laid side by side, exact for any ranks (FLoRA, arXiv 2409.05976); the adapter grows and
        has to be merged into the weights of the base (`stacking`), so a running server refuses it.
        "ffa": only B is trained and averaged (FFA-LoRA, arXiv 2403.12313). "alternate": B in odd rounds, A in even ones
        (RoLoRA, arXiv 2409.02346). Both are exact. "fedsa": both are trained, only A is shared (FedSA-LoRA, arXiv
        2410.01463); the adapter's B stays zero: what is learnt is in the devices' own models.
    gate : how router rows are combined
        "rows": a row moves with its expert, over its holders, by changes centred over each device's rows.
        "plain_rows": the same without centring (FedMoE, arXiv 2408.11304). "importance": one weight per device and
        layer from usage times importance, divided by their sum (HFedMoE, arXiv 2601.00583, eq 18-21). "mean": one
        weight per device from its data (FedAvg). "frozen": rows stay.
    members : who counts for an expert
        "trained": whose tokens trained it. "sent": who sent it. "all": everybody, the others for the old value (the
        plain mean of FFT-MoE, arXiv 2508.18663).
    weighting : what a device's data |D_k| is: valid "tokens" it trained on, or training "rows", as
        the device says
    temperature : t of the weight |D_k| (n_k / N_k)^t, n_k of N_k tokens trained the expert (FLAME, arXiv 2506.16600);
        1 with "tokens" is n_k. "sent" and "all" count every device with t = 0
    tau : least usage u_k(e), the mean router probability, of those who count (HFedMoE eq 17)
    prior : mass of the old value, as a share of the median total mass of the experts trained in the round
    copy_single : an expert that one device trained is copied from it as it is (FedMoE)
    staleness : s of the factor (1 + age)^-s, age in rounds
    clip : changes larger than so many median norms are scaled down to that; 0: off
    sign_conflict : coordinates on whose sign the holders disagree are left alone ("drop") or damped ("scale")
    robust : coordinate-wise "median" or "trimmed" mean of the factors' changes where at least 3 hold an expert, without
        weights (arXiv 1803.01498)
    gate_blend : lambda of the importance s_b = lambda mean g + (1 - lambda) peak g (HFedMoE eq 5)
    """

    lora: Lora = "svd"
    gate: Gate = "rows"
    members: Members = "trained"
    weighting: Weighting = "tokens"
    temperature: float = 1.0
    tau: float = 0.0
    prior: float = 0.05
    copy_single: bool = False
    staleness: float = 0.5
    clip: float = 0.0
    sign_conflict: SignConflict = "off"
    robust: Robust = "mean"
    gate_blend: float = 0.5

    def __post_init__(self) -> None:
        """Raise ValueError, in one line, for a value out of its range."""
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                wanted = ", ".join(get_args(choices))
                raise ValueError(f"{name} {getattr(self, name)!r} found, one of {wanted} wanted")
        for name, most in {
            "temperature": 16.0,
            "tau": 1.0,
            "prior": 100.0,
            "staleness": 16.0,
            "clip": 1e6,
            "gate_blend": 1.0,
        }.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= most):
                raise ValueError(f"{name} {value} found, 0 to {most:g} wanted")

    def objective(self, objective: Objective, round: int) -> Objective:
        """What devices train and send in a round under these rules.

        Parameters
        ----------
        objective : the run's
        round : counted from 1; alternation starts with B, because A gets no gradient while B is zero

        Examples
        --------
        >>> [Rules(lora="alternate").objective(Objective(), r).factors for r in (1, 2)]
        ['lora_B', 'lora_A']
        >>> Rules(lora="fedsa").objective(Objective(), 1).personal
        True
        """
        if self.lora == "ffa" or (self.lora == "alternate" and round % 2):
            return replace(objective, factors="lora_B")
        if self.lora == "alternate":
            return replace(objective, factors="lora_A")
        if self.lora == "fedsa":
            return replace(objective, personal=True)
        return objective

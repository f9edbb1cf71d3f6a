"""What a device minimises beside the cross entropy of its answers; the server says it with every lease.

Letters: P resident experts of a layer, k experts per token, f share of routed places, g router probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from protocol import names
from protocol.schema import SchemaError


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Terms of the local objective. Every weight is 0 by default: plain cross entropy.

    Attributes
    ----------
    label_smoothing : share of the target spread evenly over the vocabulary, in [0, 1) (FedMoE, arXiv 2408.11304)
    balance : weight of Switch's load balance, P * sum_e f_e mean g_e over the residents (arXiv 2101.03961)
    target_balance : weight of the heterogeneity-aware balance (k/P)^(-1/2) KL(target || mean g)
        (after FFT-MoE, arXiv 2508.18663)
    target_mix, target_kappa : mu and kappa of that target: share and sharpness of the server's wish for rarely trained
        experts
    z_loss : weight of mean logsumexp(router logits)^2
    prox : mu of FedProx, mu/2 |w - w_lease|^2 over what is trained
    scaffold : correct gradients by control variates (SCAFFOLD); they travel with adapter and update
    cap : at most so many experts of a layer take part in a batch; 0: all residents
    cap_where : "both": the others get no token; "backward": as HFedMoE prints it, they only get no gradient
    active : experts per token, at most the base's k; 0: k (FLAME, FFT-MoE)
    label_prior : tau of a loss that knows how often the device sees each label: tau * log of the label's share is added
        to the label's logit in training (logit adjustment, arXiv 2007.07314; in federations FedLC, arXiv 2209.00189),
        so that a device does not teach the fleet what it mostly has itself; when it answers for its owner it adds the
        same, and so keeps what it knows about its own rows. Without labels it does nothing
    adam_eps : epsilon of Adam. Adam makes steps of one size whatever the gradient is; with an epsilon of the gradients'
        own size, a device that has little to learn moves little
    output_scale : learn one factor per layer on the experts' output; it stays on the device (FLAME)
    factors : the LoRA factors that are trained and sent: "lora_B" is FFA-LoRA (arXiv 2403.12313), one and the other in
        turn is RoLoRA (arXiv 2502.01755). Router rows are trained either way
    personal : lora_B is trained but stays on the device, which uses it again at its next lease (FedSA-LoRA,
        arXiv 2410.01463)
    """

    label_smoothing: float = 0.0
    balance: float = 0.0
    target_balance: float = 0.0
    target_mix: float = 0.2
    target_kappa: float = 1.0
    z_loss: float = 0.0
    prox: float = 0.0
    scaffold: bool = False
    cap: int = 0
    cap_where: Literal["both", "backward"] = "both"
    active: int = 0
    output_scale: bool = False
    label_prior: float = 0.0
    adam_eps: float = 1e-8
    factors: Literal["both", "lora_A", "lora_B"] = "both"
    personal: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise SchemaError(f"label_smoothing {self.label_smoothing}, 0 to below 1 wanted")
        for name in (
            "balance",
            "target_balance",
            "target_kappa",
            "z_loss",
            "prox",
            "label_prior",
        ):
            if not 0 <= getattr(self, name) <= 1e6:
                raise SchemaError(f"{name} {getattr(self, name)}, 0 to 1e6 wanted")
        if not 1e-12 <= self.adam_eps <= 1:
            raise SchemaError(f"adam_eps {self.adam_eps}, 1e-12 to 1 wanted")
        if not 0 <= self.target_mix <= 1:
            raise SchemaError(f"target_mix {self.target_mix}, 0 to 1 wanted")
        if self.cap < 0 or self.active < 0:
            raise SchemaError(f"cap {self.cap}, active {self.active}: 0 or more wanted")
        if self.personal and self.factors != "both":
            raise SchemaError(f"personal lora_B with factors {self.factors!r}: 'both' wanted")

    def trains(self, name: str) -> bool:
        """Whether a tensor of a trained expert is itself trained.

        >>> Objective(factors="lora_B").trains("layers.0.experts.1.up.lora_A")
        False
        >>> Objective(factors="lora_B").trains("layers.0.router.1")
        True
        """
        parsed = names.parse(name)
        if parsed is None:
            return False
        return parsed.factor is None or self.factors in ("both", parsed.factor)

    def sends(self, name: str) -> bool:
        """Whether a tensor of a trained expert is part of the update.

        >>> Objective(personal=True).sends("layers.0.experts.1.up.lora_B")
        False
        """
        return self.trains(name) and not (self.personal and name.endswith(".lora_B"))

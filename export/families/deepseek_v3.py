"""DeepSeek-V3, R1 and Moonlight: sigmoid router with a selection bias per expert, groups, shared experts."""

import dataclasses

import torch
from torch import Tensor

from export.families import deepseek_v2, group_limited
from export.families.family import Config, Rows

BIAS = f"{deepseek_v2.BLOCK}.gate.e_score_correction_bias"


def route(logits: Tensor, rows: Rows, config: Config) -> tuple[Tensor, Tensor]:
    """The bias decides who is chosen, the sigmoid alone how much it weighs.

    A token whose chosen groups hold fewer than k residents gets slots of weight 0 for the rest.
    """
    score = torch.sigmoid(logits)
    choice = score.detach() + rows["bias"]
    if "group" in rows:
        there = group_limited.allowed(choice, rows["group"], 2, config["topk_group"])
        score = score * there
        choice = torch.where(there > 0, choice, group_limited.ABSENT)
    slot = torch.topk(choice, config["num_experts_per_tok"], -1).indices
    weight = score.gather(1, slot)
    if config["norm_topk_prob"]:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return weight * config["routed_scaling_factor"], slot


def probabilities(logits: Tensor, config: Config) -> Tensor:
    """Sigmoid scores as shares of their sum; the selection bias is left out."""
    score = torch.sigmoid(logits)
    return score / score.sum(-1, keepdim=True)


FAMILY = dataclasses.replace(
    deepseek_v2.FAMILY,
    model_type="deepseek_v3",
    router_extra={"bias": BIAS},
    route=route,
    renormalises=lambda config: bool(config["norm_topk_prob"]),
    probabilities=probabilities,
    peft=dataclasses.replace(
        deepseek_v2.FAMILY.peft,
        base_model_class="DeepseekV3ForCausalLM",
        parent_library="transformers.models.deepseek_v3.modeling_deepseek_v3",
        router_extra={"bias": f"base_model.model.{BIAS}"},
    ),
)

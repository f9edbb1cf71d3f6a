"""DeepSeek-V2 and V2-Lite: shared experts, first layers dense, latent attention, softmax router over a few groups."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.families import group_limited, mla
from export.families.family import (
    Config,
    Family,
    Rows,
    from_layer,
    fused,
    key,
    peft_layout,
    split,
)

BLOCK = "model.layers.{layer}.mlp"


def route(logits: Tensor, rows: Rows, config: Config) -> tuple[Tensor, Tensor]:
    """Top-k probabilities within the chosen groups, not renormalised. transformers ignores `norm_topk_prob` here."""
    score = F.softmax(logits, -1)
    if "group" in rows and config["topk_method"] == "group_limited_greedy":
        score = score * group_limited.allowed(score, rows["group"], 1, config["topk_group"])
    weight, slot = torch.topk(score, config["num_experts_per_tok"], -1)
    return weight * config["routed_scaling_factor"], slot


def shared(block: nn.Module, hidden: Tensor) -> Tensor:
    """The shared experts, one wide MLP."""
    return block.shared_experts(hidden)


FAMILY = Family(
    model_type="deepseek_v2",
    fused=fused(BLOCK),
    split=split(BLOCK, "gate_proj", "up_proj", "down_proj"),
    router=f"{BLOCK}.gate.weight",
    router_made=group_limited.one_hot,
    block=BLOCK,
    num_experts=key("n_routed_experts"),
    top_k=key("num_experts_per_tok"),
    intermediate=key("moe_intermediate_size"),
    moe_layers=from_layer("first_k_dense_replace"),
    route=route,
    shared=shared,
    adapt=mla.adapt,
    peft=peft_layout(
        experts=f"{BLOCK}.experts",
        router=f"{BLOCK}.gate.weight",
        save="mlp.gate",
        base_model_class="DeepseekV2ForCausalLM",
        parent_library="transformers.models.deepseek_v2.modeling_deepseek_v2",
    ),
)

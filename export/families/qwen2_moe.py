"""Qwen1.5-MoE and Qwen2-MoE: a shared expert behind a sigmoid gate beside the routed ones; some layers may be dense."""

import torch
from torch import Tensor, nn

from export.families.family import (
    Family,
    every_nth_layer,
    fused,
    key,
    peft_layout,
    softmax_top_k,
    split,
)

BLOCK = "model.layers.{layer}.mlp"
TOP_K = key("num_experts_per_tok")


def shared(block: nn.Module, hidden: Tensor) -> Tensor:
    """The shared expert, weighted by its own gate."""
    return torch.sigmoid(block.shared_expert_gate(hidden)) * block.shared_expert(hidden)


FAMILY = Family(
    model_type="qwen2_moe",
    fused=fused(BLOCK),
    split=split(BLOCK, "gate_proj", "up_proj", "down_proj"),
    router=f"{BLOCK}.gate.weight",
    block=BLOCK,
    num_experts=key("num_experts", "num_local_experts"),
    top_k=TOP_K,
    intermediate=key("moe_intermediate_size"),
    moe_layers=every_nth_layer,
    route=softmax_top_k(TOP_K, key("norm_topk_prob")),
    renormalises=key("norm_topk_prob"),
    shared=shared,
    peft=peft_layout(
        experts=f"{BLOCK}.experts",
        router=f"{BLOCK}.gate.weight",
        save="mlp.gate",
        base_model_class="Qwen2MoeForCausalLM",
        parent_library="transformers.models.qwen2_moe.modeling_qwen2_moe",
    ),
)

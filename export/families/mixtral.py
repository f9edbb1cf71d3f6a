"""Mixtral (Jiang et al. 2024): top-2 of 8, weights renormalised over the two, no shared experts, every layer sparse."""

from export.families.family import (
    Family,
    every_layer,
    fused,
    key,
    peft_layout,
    softmax_top_k,
    split,
)

BLOCK = "model.layers.{layer}.mlp"
ON_DISK = "model.layers.{layer}.block_sparse_moe"
TOP_K = key("num_experts_per_tok")

FAMILY = Family(
    model_type="mixtral",
    fused=fused(BLOCK),
    split=split(ON_DISK, "w1", "w3", "w2"),
    aliases=((".mlp.", ".block_sparse_moe."),),
    router=f"{BLOCK}.gate.weight",
    block=BLOCK,
    num_experts=key("num_local_experts", "num_experts"),
    top_k=TOP_K,
    intermediate=key("intermediate_size"),
    moe_layers=every_layer,
    route=softmax_top_k(TOP_K, lambda config: True),
    renormalises=lambda config: True,
    peft=peft_layout(
        experts=f"{BLOCK}.experts",
        router=f"{BLOCK}.gate.weight",
        save="mlp.gate",
        base_model_class="MixtralForCausalLM",
        parent_library="transformers.models.mixtral.modeling_mixtral",
    ),
)

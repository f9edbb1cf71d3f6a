"""OLMoE (Muennighoff et al. 2024): top-k softmax router, no shared experts, every layer sparse."""

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
TOP_K = key("num_experts_per_tok")

FAMILY = Family(
    model_type="olmoe",
    fused=fused(BLOCK),
    split=split(BLOCK, "gate_proj", "up_proj", "down_proj"),
    router=f"{BLOCK}.gate.weight",
    block=BLOCK,
    num_experts=key("num_experts", "num_local_experts"),
    top_k=TOP_K,
    intermediate=key("intermediate_size"),
    moe_layers=every_layer,
    route=softmax_top_k(TOP_K, key("norm_topk_prob")),
    renormalises=key("norm_topk_prob"),
    peft=peft_layout(
        experts=f"{BLOCK}.experts",
        router=f"{BLOCK}.gate.weight",
        save="mlp.gate",
        base_model_class="OlmoeForCausalLM",
        parent_library="transformers.models.olmoe.modeling_olmoe",
    ),
)

"""Granite-MoE (IBM): softmax over the k chosen logits, scaled logits; a layer's experts in one tensor, also on disk."""

from export.families.family import Family, every_layer, fused, key, peft_layout, softmax_top_k

BLOCK = "model.layers.{layer}.block_sparse_moe"
TOP_K = key("num_experts_per_tok")

FAMILY = Family(
    model_type="granitemoe",
    fused=fused(BLOCK),
    split={},
    aliases=(
        (".experts.gate_up_proj", ".input_linear.weight"),
        (".experts.down_proj", ".output_linear.weight"),
        (".router.weight", ".router.layer.weight"),
    ),
    router=f"{BLOCK}.router.weight",
    block=BLOCK,
    num_experts=key("num_local_experts"),
    top_k=TOP_K,
    intermediate=key("intermediate_size"),
    moe_layers=every_layer,
    # A softmax over the k largest logits is the softmax over all, renormalised.
    route=softmax_top_k(TOP_K, lambda config: True),
    renormalises=lambda config: True,
    logits=lambda logits, config: logits / config["logits_scaling"],
    peft=peft_layout(
        experts=f"{BLOCK}.experts",
        router=f"{BLOCK}.router.weight",
        save="block_sparse_moe.router",
        base_model_class="GraniteMoeForCausalLM",
        parent_library="transformers.models.granitemoe.modeling_granitemoe",
    ),
)

"""OLMoE (Muennighoff et al. 2024): top-k softmax router, no shared experts, every layer sparse."""

from export.families.family import Family, every_layer, peft_layout, softmax_top_k

FAMILY = Family(
    model_type="olmoe",
    fused={
        "gate_up": "model.layers.{layer}.mlp.experts.gate_up_proj",
        "down": "model.layers.{layer}.mlp.experts.down_proj",
    },
    split={
        "gate_up": (
            "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
            "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        ),
        "down": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
    },
    router="model.layers.{layer}.mlp.gate.weight",
    block="model.layers.{layer}.mlp",
    num_experts=lambda config: config["num_experts"],
    top_k=lambda config: config["num_experts_per_tok"],
    intermediate=lambda config: config["intermediate_size"],
    moe_layers=every_layer,
    route=softmax_top_k(
        lambda config: config["num_experts_per_tok"],
        lambda config: bool(config.get("norm_topk_prob", False)),
    ),
    peft=peft_layout(
        experts="model.layers.{layer}.mlp.experts",
        router="model.layers.{layer}.mlp.gate.weight",
        save="gate",
        base_model_class="OlmoeForCausalLM",
        parent_library="transformers.models.olmoe.modeling_olmoe",
    ),
)

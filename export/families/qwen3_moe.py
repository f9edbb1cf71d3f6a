"""Qwen3-MoE: as Qwen2-MoE without the shared expert, 128 experts and top-8 in the public models."""

import dataclasses

from export.families import qwen2_moe

FAMILY = dataclasses.replace(
    qwen2_moe.FAMILY,
    model_type="qwen3_moe",
    shared=None,
    peft=dataclasses.replace(
        qwen2_moe.FAMILY.peft,
        base_model_class="Qwen3MoeForCausalLM",
        parent_library="transformers.models.qwen3_moe.modeling_qwen3_moe",
    ),
)

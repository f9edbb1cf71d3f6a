"""A tiny random checkpoint of every family, with the quirks of the real ones switched on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
GROUPS = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2}
WIDTHS = {"moe_intermediate_size": 32, "intermediate_size": 96}
YARN = {"type": "yarn", "factor": 4, "mscale": 0.7, "mscale_all_dim": 0.7} | {
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
LONG = {"type": "longrope", "short_mscale": 1.2, "long_mscale": 1.3} | {
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [2.0] * 8,
}

CONFIGS = {
    "olmoe": {**GROUPED, **EXPERTS, "intermediate_size": 32, "norm_topk_prob": False},
    "mixtral": {**GROUPED, **LOCAL, "intermediate_size": 32},
    "qwen2_moe": {
        **GROUPED,
        **EXPERTS,
        **WIDTHS,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {**GROUPED, **EXPERTS, **WIDTHS, "head_dim": 32, "norm_topk_prob": True},
    "granitemoe": {
        **GROUPED,
        **LOCAL,
        "intermediate_size": 32,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.1,
        "tie_word_embeddings": True,
    },
    "deepseek_v2": {
        **LATENT,
        **GROUPS,
        **ROUTED,
        **WIDTHS,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 2.0,
        "q_lora_rank": None,
        "rope_scaling": YARN,
    },
    "deepseek_v3": {
        **LATENT,
        **GROUPS,
        **ROUTED,
        **WIDTHS,
        "num_key_value_heads": 4,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 32,
    },
    "phimoe": {
        **GROUPED,
        **LOCAL,
        "intermediate_size": 32,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_scaling": LONG,
        "router_jitter_noise": 0.3,  # large, so that the second expert's weight is not always 1
    },
}


def config(model_type: str) -> object:
    """The family's tiny configuration."""
    return AutoConfig.for_model(model_type, **COMMON, **CONFIGS[model_type])


def random_model(model_type: str) -> torch.nn.Module:
    """Weights large enough that routing, attention and every expert matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(model_type), attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif name.endswith("correction_bias"):
                tensor.uniform_(0.0, 0.3)
            elif "rotary" not in name:
                tensor.copy_(torch.randn_like(tensor) * 0.12)
    return model.float().eval()


def write_checkpoint(model_type: str, path: Path) -> Path:
    """Save the random model as transformers does, with a tokenizer file that nobody reads."""
    random_model(model_type).save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps({"model": "none"}))
    return path

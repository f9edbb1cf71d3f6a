"""Tiny dense checkpoints and a hand-made adapter for FFT-MoE tests."""

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from protocol import lora, names

EXPERTS, TOP_K, WIDTH = 4, 2, 8
TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def write_dense(folder, model_type, **changes):
    """A random dense checkpoint."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TINY, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def random_adapter(seed=0, layers=(0, 1), hidden=64):
    """Every tensor of an adapter by its global name, nothing zero."""
    rng = np.random.default_rng(seed)
    adapter = {}
    for layer in layers:
        for e in range(EXPERTS):
            key = names.lora(layer, e, "adapter", "lora_A")
            adapter[key] = lora.fresh_a(key, WIDTH, hidden)
            u = rng.normal(0, 0.3, (hidden, WIDTH)).astype(np.float32)
            adapter[names.lora(layer, e, "adapter", "lora_B")] = u
            row = rng.normal(0, 0.1, hidden).astype(np.float32)
            adapter[names.router_row(layer, e)] = row
    return adapter

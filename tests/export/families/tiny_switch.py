"""A tiny random Switch checkpoint: two blocks in each stack, the second of them sparse."""

import torch
from tokenizers import Tokenizer, models
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

EXPERTS = 4
TINY = {
    "vocab_size": 300,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_heads": 4,
    "num_experts": EXPERTS,
    "decoder_start_token_id": 0,
    "expert_capacity": 1000,
}


def write_switch(folder, **changes):
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**{**TINY, **changes})
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    Tokenizer(models.BPE()).save(str(folder / "tokenizer.json"))
    return folder

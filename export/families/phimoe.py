"""Phi-3.5-MoE: top-2 by SparseMixer (Liu et al. 2023), each weight a softmax over the scores near its own maximum.

Trained as it is evaluated: the first and second largest, without sampling and without noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from export.families.family import (
    Config,
    Family,
    Rows,
    every_layer,
    fused,
    key,
    peft_layout,
    plain_activations,
    split,
)

BLOCK = "model.layers.{layer}.mlp"
ON_DISK = "model.layers.{layer}.block_sparse_moe"
OUT = -1e30  # below every logit, and finite


def _near(scores: Tensor, candidates: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Weight and slot [T, 1] of the best candidate, among candidates whose score is within 2 * jitter of it."""
    best, slot = candidates.detach().max(-1, keepdim=True)
    # As transformers has it: the distance is relative to the larger of |score| and the best.
    far = (best - candidates.detach()) / torch.maximum(scores.detach().abs(), best) > 2 * jitter
    return F.softmax(torch.where(far, OUT, candidates), -1).gather(1, slot), slot


def route(logits: Tensor, rows: Rows, config: Config) -> tuple[Tensor, Tensor]:
    """The best expert, then the best of the others."""
    jitter = config["router_jitter_noise"]
    first, slot = _near(logits, logits, jitter)
    taken = slot == torch.arange(logits.shape[1])
    second, other = _near(logits, torch.where(taken, OUT, logits), jitter)
    return torch.cat((first, second), -1), torch.cat((slot, other), -1)


class Rotary(nn.Module):
    """Rotary angles for sequences up to the original context, where the long factors are not in force."""

    def __init__(self, config: object) -> None:
        super().__init__()
        rope = config.rope_parameters
        if rope["rope_type"] == "default":
            size = config.hidden_size // config.num_attention_heads
            steps = torch.arange(0, size, 2, dtype=torch.float32) / size
            inverse, self.scale = 1 / rope["rope_theta"] ** steps, 1.0
        else:
            inverse, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=1)
            self.scale = float(rope["short_mscale"])
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, S, head]."""
        angles = position_ids.unsqueeze(-1).to(torch.float32) * self.inverse
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * self.scale, angles.sin() * self.scale


def adapt(model: nn.Module) -> None:
    """Replace the rotary embedding, which looks at its data, and activations."""
    plain_activations(model)
    model.model.rotary_emb = Rotary(model.config)


FAMILY = Family(
    model_type="phimoe",
    fused=fused(BLOCK),
    split=split(ON_DISK, "w1", "w3", "w2"),
    aliases=((".mlp.router.", ".block_sparse_moe.gate."),),
    router=f"{BLOCK}.router.weight",
    block=BLOCK,
    num_experts=key("num_local_experts"),
    top_k=lambda config: 2,
    intermediate=key("intermediate_size"),
    moe_layers=every_layer,
    route=route,
    adapt=adapt,
    peft=peft_layout(
        experts=f"{BLOCK}.experts",
        router=f"{BLOCK}.router.weight",
        save="mlp.router",
        base_model_class="PhimoeForCausalLM",
        parent_library="transformers.models.phimoe.modeling_phimoe",
    ),
)

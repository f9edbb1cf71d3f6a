"""FFT-MoE (Hu et al. 2025): small trained experts and a router beside every feed-forward block of a frozen dense model.

    block(x) = FFN(x) + sum over the k best experts m of (p_m / their sum) * U_m silu(V_m x),   p = softmax(W x)

V_m [h, d] is the expert's `adapter.lora_A`, U_m [d, h] its `adapter.lora_B`, zero at first, so that training starts at
the dense model; there is no LoRA scale. W [E, d] is drawn afresh by name, the same on every machine, and trained as
changes of its rows like any router. The paper's formulas are not public: this is the reconstruction of its abstract.

A dense checkpoint becomes such a base through three keys in its configuration, see `with_experts`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from export.families.family import (
    Config,
    Family,
    FamilyError,
    every_layer,
    softmax_top_k,
)
from protocol import fft_moe, lora

DENSE = ("gemma", "llama", "qwen2", "qwen3")
"""Decoders whose feed-forward block is the module `protocol.fft_moe.BLOCK`, of one argument."""

EXPERTS, TOP_K = "adapter_experts", "adapter_top_k"


def with_experts(config: Config, experts: int, top_k: int, where: str) -> Config:
    """The configuration of a dense checkpoint, with adapter experts asked for.

    Raises
    ------
    FamilyError
        The model is not one of `DENSE`, or there are fewer experts than are used at once.
    """
    model_type = str(config.get("model_type"))
    if model_type not in DENSE:
        raise FamilyError(
            f"{where}: adapter experts go beside a dense model ({', '.join(DENSE)}), "
            f"model_type '{model_type}' found"
        )
    if not 1 <= top_k <= experts:
        raise FamilyError(f"{where}: {top_k} of {experts} adapter experts cannot be used at once")
    return {**config, EXPERTS: experts, TOP_K: top_k}


def fresh_router(layer: int, config: Config) -> NDArray[np.float32]:
    """W [E, d]: small, and the same on every machine."""
    return lora.fresh_a(f"layers.{layer}.router", int(config[EXPERTS]), int(config["hidden_size"]))


def family(config: Config) -> Family:
    """The family of a dense checkpoint with adapter experts."""
    return Family(
        model_type=str(config["model_type"]),
        fused={},
        split={},
        router="",
        block=fft_moe.BLOCK,
        num_experts=lambda config: int(config[EXPERTS]),
        top_k=lambda config: int(config[TOP_K]),
        intermediate=lambda config: int(config["intermediate_size"]),
        moe_layers=every_layer,
        route=softmax_top_k(lambda config: int(config[TOP_K]), lambda config: True),
        renormalises=lambda config: True,
        # The frozen block itself is what every token gets.
        shared=lambda block, hidden: block(hidden),
        activation=lambda config: "silu",
        projections=("adapter",),
        fresh_router=fresh_router,
        peft=None,
    )

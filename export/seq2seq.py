"""What an encoder-decoder (Switch Transformers) does differently in the graph of a sub-MoE.

The prompt (`tokens`, `valid`) is the encoder's input. The decoder's input is made from `targets`, shifted right behind
the start token, so that its K positions answer one after the other; `positions` is not used.

Letters: B batch rows, S tokens per row, K answer positions per row, d hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.families.family import Config

START = "decoder_start_token_id"
EMBEDDING = "shared.weight"
"""Of both stacks and, transposed, the head."""


def tie(model: Any) -> None:
    """One embedding module for both stacks, as `shared` has it: a weight put there is then seen by all."""
    model.encoder.set_input_embeddings(model.shared)
    model.decoder.set_input_embeddings(model.shared)


def decoder_input(targets: Tensor, config: Config) -> Tensor:
    """Targets [B, K] shifted right behind the start token.

    >>> decoder_input(torch.tensor([[7, 8, 9]]), {"decoder_start_token_id": 0}).tolist()
    [[0, 7, 8]]
    """
    start = config.get(START)
    first = torch.full_like(targets[:, :1], config["pad_token_id"] if start is None else start)
    return torch.cat([first, targets[:, :-1]], 1)


def valid_tokens(layer: int, given: Mapping[str, Tensor], config: Config) -> Tensor:
    """Which tokens that pass a layer count: of the prompt in the encoder, those that are scored in the decoder.

    Returns
    -------
    float32 [B, S] or [B, K]
    """
    if layer < int(config["num_layers"]):
        return given["valid"]
    return (given["weights"] > 0).to(torch.float32)


def answers(
    model: nn.Module, weights: dict[str, Tensor], given: Mapping[str, Tensor], config: Config
) -> Tensor:
    """The decoder's last hidden states, [B * K, d]."""
    # Masks of four dimensions are taken as they are; the classes' own are made with operators that cannot be lowered.
    lowest = torch.finfo(torch.float32).min
    padding = (1.0 - given["valid"][:, None, None, :]) * lowest
    k = given["targets"].shape[1]
    causal = torch.triu(torch.full((k, k), lowest), 1).expand(given["targets"].shape[0], 1, k, k)
    inputs = {
        "tokens": given["tokens"],
        "valid": given["valid"],
        "padding": padding,
        "start": decoder_input(given["targets"], config),
        "causal": causal,
    }
    return functional_call(
        _Stacks(model), {f"model.{n}": t for n, t in weights.items()}, (), inputs
    )


class _Stacks(nn.Module):
    """Both stacks without the head: `functional_call` wants one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, valid: Tensor, padding: Tensor, start: Tensor, causal: Tensor
    ) -> Tensor:
        encoded = self.model.encoder(input_ids=tokens, attention_mask=valid).last_hidden_state
        decoded = self.model.decoder(
            input_ids=start,
            attention_mask=causal,
            encoder_hidden_states=encoded,
            encoder_attention_mask=padding,
            use_cache=False,
        ).last_hidden_state
        return decoded.reshape(-1, decoded.shape[-1])

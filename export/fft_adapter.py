"""Put an FFT-MoE adapter written by the server into a transformers model; stock PEFT has no such layer.

    from transformers import AutoModelForCausalLM
    from export import fft_adapter

    model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
    fft_adapter.load(model, "state/adapters/5")     # the model now answers, and generates, with the adapter
    fft_adapter.remove(model)                       # and without it again

Every feed-forward block gets a child module `adapter_experts`, whose output is added to the block's own. It moves with
`model.to(...)`, and its factors and router are ordinary parameters. Layout and formula: `protocol.fft_moe`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from protocol import fft_moe, names, schema


class FftAdapterError(ValueError):
    """A directory that holds no adapter for this model."""


class AdapterExperts(nn.Module):
    """The adapter experts of one block. Letters: E experts, h width, d hidden, T tokens."""

    def __init__(self, router: Tensor, a: list[Tensor], b: list[Tensor], top_k: int) -> None:
        super().__init__()
        self.router = nn.Parameter(router, requires_grad=False)  # [E, d]
        self.a = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in a)  # [h, d] each
        self.b = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in b)  # [d, h] each
        self.top_k = top_k

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., d] -> the same shape."""
        x = hidden.reshape(-1, hidden.shape[-1])
        p = F.softmax(x.float() @ self.router.float().t(), -1)
        weight, chosen = p.topk(self.top_k, -1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for expert, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            token, place = torch.where(chosen == expert)
            y = F.silu(x[token] @ a.t()) @ b.t() * weight[token, place, None]
            out = out.index_add(0, token, y)
        return out.view(hidden.shape)


def read(folder: Path) -> tuple[fft_moe.FftAdapter, dict[str, Tensor]]:
    """What the directory says and holds; raises FftAdapterError."""
    try:
        data = json.loads((folder / fft_moe.CONFIG).read_bytes())
        config = schema.from_dict(fft_moe.FftAdapter, data, str(folder / fft_moe.CONFIG))
        return config, load_file(folder / fft_moe.TENSORS)
    except FileNotFoundError as error:
        raise FftAdapterError(
            f"{error.filename or folder / fft_moe.TENSORS}: no such file; a directory written by "
            "the server for an FFT-MoE base is wanted"
        ) from error
    except schema.SchemaError as error:
        raise FftAdapterError(str(error)) from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise FftAdapterError(f"{folder}: unreadable: {error}") from error


def load(model: Any, folder: str | Path) -> Any:
    """Add the adapter in `folder` to `model` in place, and return it.

    Parameters
    ----------
    model : transformers causal language model of the class that the adapter was trained on
    folder : directory with `fft_adapter.json` and `fft_adapter.safetensors`

    Raises
    ------
    FftAdapterError
        No adapter there, tensors missing, left over or of another shape, another model class, or one is loaded already.
    """
    folder = Path(folder)
    config, state = read(folder)
    if model.config.model_type != config.model_type:
        raise FftAdapterError(
            f"{folder}: trained on '{config.model_type}', the model is '{model.config.model_type}'"
        )
    made, hidden = {}, model.config.hidden_size
    for layer in config.layers:
        path = fft_moe.BLOCK.format(layer=layer)
        try:
            block = model.get_submodule(path)
        except AttributeError as error:
            raise FftAdapterError(f"{folder}: the model has no {path}") from error
        if "adapter_experts" in dict(block.named_children()):
            raise FftAdapterError(
                f"{folder}: {path} has adapter experts already; remove them first"
            )
        like = next(block.parameters())
        keys = [
            [names.lora(layer, e, "adapter", factor) for e in range(config.experts)]
            for factor in names.FACTORS
        ]
        try:
            router = state.pop(f"layers.{layer}.router")
            a, b = ([state.pop(key).to(like) for key in row] for row in keys)
        except KeyError as error:
            raise FftAdapterError(f"{folder}: tensor {error.args[0]} is missing") from error
        fits = all(
            v.ndim == 2 and v.shape[1] == hidden and u.shape == (hidden, v.shape[0])
            for v, u in zip(a, b, strict=True)
        )
        if router.shape != (config.experts, hidden) or not fits:
            raise FftAdapterError(f"{folder}: layer {layer} does not fit a hidden size of {hidden}")
        made[block] = AdapterExperts(router.to(like.device), a, b, config.top_k)
    if state:
        raise FftAdapterError(f"{folder}: tensor {min(state)} belongs nowhere")
    for block, experts in made.items():
        block.add_module("adapter_experts", experts)
        experts.hook = block.register_forward_hook(_add)
    return model


def _add(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + block.adapter_experts(args[0])


def remove(model: Any) -> None:
    """Take the adapter off again."""
    for module in list(model.modules()):
        experts = dict(module.named_children()).get("adapter_experts")
        if isinstance(experts, AdapterExperts):
            experts.hook.remove()
            del module.adapter_experts

"""The same check for an FFT-MoE adapter: our loader against the graph's arithmetic over the server's own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import fft_adapter
from export.adapter_experts import adapter_experts
from export.families import fft_moe
from protocol import fft_moe as layout
from protocol import names

Arrays = Mapping[str, NDArray[Any]]


def _hook(model: Any, config: Any, read: layout.FftAdapter, adapter: Arrays, layer: int) -> Any:
    """Add a layer's experts, as a device computes them."""
    experts = range(read.experts)
    change = np.stack([adapter[names.router_row(layer, e)] for e in experts])
    router = torch.from_numpy(fft_moe.fresh_router(layer, config) + change)
    a, b = (
        [adapter[names.lora(layer, e, "adapter", factor)] for e in experts]
        for factor in names.FACTORS
    )
    flat = [torch.from_numpy(np.concatenate([v.ravel() for v in part])) for part in (a, b)]
    family = fft_moe.family(config)

    def add(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(-1, args[0].shape[-1])
        weight, slot = family.route(x @ router.T, {}, config)
        y = adapter_experts(x, weight, slot, *flat, [v.shape[0] for v in a])
        return output + y.view(output.shape)

    return model.get_submodule(layout.BLOCK.format(layer=layer)).register_forward_hook(add)


@torch.no_grad()
def compare(
    model: Any, config: dict[str, Any], folder: Path, adapter: Arrays, ids: Tensor
) -> tuple[float, float, float]:
    """Largest difference of a logit and of a stored factor, and how far the adapter moves a logit.

    Parameters
    ----------
    model : the dense transformers model; as it was, afterwards
    config : its configuration
    folder : the directory that the server wrote
    adapter : the server's own tensors, by global name

    Raises
    ------
    FftAdapterError
        The directory is not what our loader reads.
    """
    read, stored = fft_adapter.read(folder)
    config = fft_moe.with_experts(config, read.experts, read.top_k, str(folder))
    factors = [name for name in stored if names.parse(name) is not None]
    worst = max(float(np.abs(stored[n].numpy() - adapter[n]).max()) for n in factors)
    plain = model(input_ids=ids).logits
    loaded = fft_adapter.load(model, folder)(input_ids=ids).logits
    fft_adapter.remove(model)
    hooks = [_hook(model, config, read, adapter, layer) for layer in read.layers]
    meant = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return (
        float((loaded - meant).abs().max()),
        worst,
        float((meant - plain).abs().max()),
    )

"""transformers as the reference: weights rounded to what the blobs hold, routers that cannot choose absent experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from export.families.family import Family
from protocol import packing

Resident = dict[int, tuple[int, ...]]


def rounded(weight: torch.Tensor, format: str) -> torch.Tensor:
    """A matrix as its blob gives it back."""
    packed = packing.quantize(weight.numpy(), format)
    return torch.from_numpy(packing.dequantize(*packed, format))


@torch.no_grad()
def round_weights(
    model: nn.Module, family: Family, layers: tuple[int, ...], dense: str, experts: dict[Any, str]
) -> None:
    """Round every weight of a transformers model; `experts` is (layer, expert) -> format."""
    routers = {family.router.format(layer=layer) for layer in layers}
    fused = {path.format(layer=layer): layer for layer in layers for path in family.fused.values()}
    for name, parameter in model.named_parameters():
        if name in fused:
            for expert, weight in enumerate(parameter):
                weight.copy_(rounded(weight, experts.get((fused[name], expert), "int4")))
        elif name not in routers and packing.packs(tuple(parameter.shape)):
            parameter.copy_(rounded(parameter, dense))


def gate_of(model: nn.Module, family: Family, layer: int) -> nn.Module:
    """The router module of a layer."""
    return model.get_submodule(family.router.format(layer=layer).rpartition(".")[0])


@contextlib.contextmanager
def masked(model: nn.Module, family: Family, resident: Resident) -> Iterator[None]:
    """Within it absent experts have a router logit of minus infinity, and a hopeless selection bias."""
    absent, saved, linear = {}, [], F.linear
    for layer, held in resident.items():
        gate = gate_of(model, family, layer)
        out = torch.ones(gate.weight.shape[0], dtype=torch.bool)
        out[list(held)] = False
        absent[id(gate.weight)] = out
        bias = getattr(gate, "e_score_correction_bias", None)
        if bias is not None:
            saved.append((bias, bias.clone()))
            bias[out] = -1e4

    def patched(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = linear(x, weight, bias)
        out = absent.get(id(weight))
        return y if out is None else y.masked_fill(out, float("-inf"))

    F.linear = patched
    try:
        yield
    finally:
        F.linear = linear
        for bias, value in saved:
            bias.copy_(value)

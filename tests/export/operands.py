"""Random arguments for our operators, the experts computed token by token, and programs of a single function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.export import export
from torch.fx.experimental.proxy_tensor import make_fx

from edge import native
from export import ops
from export.to_executorch import lower
from protocol import lora, packing

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Layer:
    """The slots of a layer, as the operator takes them and as plain matrices."""

    formats: tuple[str, ...]
    ranks: tuple[int, ...]
    activation: str = "silu"
    gated: bool = True
    hidden: int = 64
    width: int = 32

    def sizes(self):
        """(out, in) of both projections."""
        rows = 2 * self.width if self.gated else self.width
        return (rows, self.hidden), (self.hidden, self.width)

    def tensors(self, seed=0):
        """The eight flat arguments."""
        rng = np.random.default_rng(seed)
        flat = [[] for _ in range(8)]
        for format, rank in zip(self.formats, self.ranks, strict=True):
            for i, (out, features) in enumerate(self.sizes()):
                weight = rng.normal(size=(out, features)) / math.sqrt(features)
                packed, scale = packing.quantize(weight, format)
                parts = packed, scale
                for place, part in zip((2 * i, 2 * i + 1), parts, strict=True):
                    flat[place].append(part.reshape(-1))
                for place, count in ((4 + 2 * i, rank * features), (5 + 2 * i, out * rank)):
                    flat[place].append(rng.normal(0, 0.1, count).astype(np.float32))
        return [torch.from_numpy(np.concatenate(parts)) for parts in flat]

    def rest(self):
        """The arguments after the tensors."""
        formats = [packing.FORMATS.index(format) for format in self.formats]
        activation = ops.ACTIVATIONS.index(self.activation)
        return formats, list(self.ranks), activation, self.width, self.gated

    def merged(self, tensors):
        """Per slot the two matrices with LoRA added; differentiable in the factors."""
        at, slots = [0] * 8, []
        for format, rank in zip(self.formats, self.ranks, strict=True):
            pair = []
            for i, (out, features) in enumerate(self.sizes()):
                packed = out * features * packing.BITS[format] // 8
                sizes = (packed, out * features // 32, rank * features, out * rank)
                places = (2 * i, 2 * i + 1, 4 + 2 * i, 5 + 2 * i)
                parts = [tensors[p][at[p] : at[p] + n] for p, n in zip(places, sizes, strict=True)]
                for p, n in zip(places, sizes, strict=True):
                    at[p] += n
                frozen = packing.dequantize(
                    parts[0].numpy().reshape(out, -1), parts[1].numpy().reshape(out, -1), format
                )
                change = parts[3].view(out, rank) @ parts[2].view(rank, features)
                pair.append(torch.from_numpy(frozen) + lora.SCALE * change)
            slots.append(pair)
        return slots

    def by_token(self, x, weight, slot, tensors):
        """(y [T, d], norms [T, k]), one token and one expert at a time, in differentiable torch."""
        slots, rows, norms = self.merged(tensors), [], []
        for token, weights, chosen in zip(x, weight, slot, strict=True):
            row, own = torch.zeros_like(token), []
            for share, place in zip(weights, chosen, strict=True):
                up, down = slots[int(place)]
                h = up @ token
                if self.gated:
                    h = ACTIVATIONS[self.activation](h[: self.width]) * h[self.width :]
                else:
                    h = ACTIVATIONS[self.activation](h)
                output = down @ h
                row = row + share * output
                own.append(output.norm())
            rows.append(row)
            norms.append(torch.stack(own))
        return torch.stack(rows), torch.stack(norms)


def routing(tokens, k, slots, seed=0, among=None):
    """x-independent routing: weights [T, k] and distinct slots [T, k], of those in `among`."""
    generator = torch.Generator().manual_seed(seed)
    among = torch.arange(slots) if among is None else torch.tensor(among)
    order = torch.rand(tokens, len(among), generator=generator).argsort(-1)[:, :k]
    return torch.rand(tokens, k, generator=generator), among[order]


def program(function, arguments, path):
    """`function` of tensors, traced with its gradients, lowered and opened."""
    graph = make_fx(function, tracing_mode="fake")(*arguments)
    path.write_bytes(lower(export(graph, tuple(arguments), strict=False)).program)
    return native.Program(path)


def run(opened, arguments):
    """Outputs of a program, copied."""
    arrays = [np.ascontiguousarray(a.numpy()) for a in arguments]
    return [value.copy() for value in opened.run("forward", arrays)]

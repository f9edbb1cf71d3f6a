"""Our own operators: products of packed weights, causal attention, and the routed experts of a layer.

Here as torch operators with a plain reference, which is what eager runs and tests use; `edge/native/ops.cpp` has the
same for the ExecuTorch runtime, where frozen weights are dequantised tile by tile and only routed tokens are computed.

Letters: T tokens, P slots, k experts a token, d hidden, f expert width, u rows of the first projection (2f gated,
else f). A layer's arguments are flat, slot after slot: packed weights uint8, scales float16, LoRA factors A [R, in] and
B [out, R] float32; `formats` index `packing.FORMATS`, `ranks` may be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from protocol import lora, packing

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # by number, as in edge/native/activation.h
_ACT = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_LAYER = (
    "Tensor up_packed, Tensor up_scale, Tensor down_packed, Tensor down_scale, Tensor up_a, Tensor up_b, "
    "Tensor down_a, Tensor down_b, int[] formats, int[] ranks, int activation, int width, bool gated"
)
SCHEMAS = {
    "packed_linear": ("Tensor x, Tensor packed, Tensor scale, int format, int out", ("y",)),
    "packed_linear_backward": (
        "Tensor dy, Tensor packed, Tensor scale, int format, int features",
        ("dx",),
    ),
    "packed_embedding": ("Tensor ids, Tensor packed, Tensor scale, int format, int d", ("y",)),
    "routed_experts": (f"Tensor x, Tensor weight, Tensor slot, {_LAYER}", ("y", "saved")),
    "routed_experts_norms": (f"Tensor x, Tensor weight, Tensor slot, {_LAYER}", ("y", "norms")),
    "routed_experts_backward": (
        f"Tensor dy, Tensor x, Tensor weight, Tensor slot, Tensor saved, {_LAYER}",
        ("dx", "dweight", "d_up_a", "d_up_b", "d_down_a", "d_down_b"),
    ),
    "causal_attention": ("Tensor q, Tensor k, Tensor v, float scale, int window", ("y", "lse")),
    "causal_attention_backward": (
        "Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, float scale, int window",
        ("dq", "dk", "dv"),
    ),
}
_library = torch.library.Library("expertfleet", "DEF")
for _name, (_arguments, _outputs) in SCHEMAS.items():
    _plain, _written = ["Tensor"] * len(_outputs), []
    for _letter, _output in zip("abcdef", _outputs, strict=False):
        _written.append(f"Tensor({_letter}!) {_output}")
    _returns = ", ".join(w.rpartition(" ")[0] for w in _written)
    _library.define(f"{_name}({_arguments}) -> ({', '.join(_plain)})")
    _library.define(f"{_name}.out({_arguments}, *, {', '.join(_written)}) -> ({_returns})")


def dequantize(packed: Tensor, scale: Tensor, format: int, out: int, features: int) -> Tensor:
    """`packing.dequantize` of a flat weight, float32 [out, in]."""
    if packing.FORMATS[format] == "int8":
        levels = packed.to(torch.float32) - 128
    else:
        codes = torch.stack((packed >> 4, packed & 15), -1)
        nf4 = packing.FORMATS[format] == "nf4"
        levels = torch.from_numpy(packing.NF4)[codes.long()] if nf4 else codes.to(torch.float32) - 8
    return (levels.reshape(-1, packing.GROUP) * scale.reshape(-1, 1).float()).view(out, features)


def _packed_linear(x: Tensor, packed: Tensor, scale: Tensor, format: int, out: int) -> Tensor:
    return x @ dequantize(packed, scale, format, out, x.shape[1]).t()


def _packed_linear_backward(
    dy: Tensor, packed: Tensor, scale: Tensor, format: int, features: int
) -> Tensor:
    return dy @ dequantize(packed, scale, format, dy.shape[1], features)


def _packed_embedding(ids: Tensor, packed: Tensor, scale: Tensor, format: int, d: int) -> Tensor:
    wide = packed.view(-1, d * packing.BITS[packing.FORMATS[format]] // 8)[ids.reshape(-1)]
    groups = scale.view(-1, d // packing.GROUP)[ids.reshape(-1)]
    return dequantize(wide, groups, format, ids.numel(), d).view(*ids.shape, d)


def _slots(arguments: Sequence[Any], hidden: int) -> list[tuple[Tensor | None, ...]]:
    """Per slot: the two dequantised projections, and the four LoRA factors."""
    up, up_s, down, down_s, up_a, up_b, down_a, down_b, formats, ranks, _, f, gated = arguments
    d, u = hidden, 2 * f if gated else f
    at = [0] * 8
    slots = []
    for format, rank in zip(formats, ranks, strict=True):
        bits = packing.BITS[packing.FORMATS[format]]
        sizes = (
            *(u * d * bits // 8, u * d // packing.GROUP, d * f * bits // 8, d * f // packing.GROUP),
            *(rank * d, u * rank, rank * f, d * rank),
        )
        flat = (up, up_s, down, down_s, up_a, up_b, down_a, down_b)
        part = [t[i : i + n] for t, i, n in zip(flat, at, sizes, strict=True)]
        at = [i + n for i, n in zip(at, sizes, strict=True)]
        slots.append(
            (
                dequantize(part[0], part[1], format, u, d),
                dequantize(part[2], part[3], format, d, f),
                *(part[4].view(rank, d), part[5].view(u, rank)),
                *(part[6].view(rank, f), part[7].view(d, rank)),
            )
        )
    return slots


def _expert(x: Tensor, slot: Sequence[Tensor], activation: int, gated: bool) -> Tensor:
    up, down, up_a, up_b, down_a, down_b = slot
    h = x @ up.t() + (x @ up_a.t()) @ up_b.t() * lora.SCALE
    act = _ACT[ACTIVATIONS[activation]]
    if gated:
        gate, other = h.chunk(2, -1)
        h = act(gate) * other
    else:
        h = act(h)
    return h @ down.t() + (h @ down_a.t()) @ down_b.t() * lora.SCALE


def reference(x: Tensor, weight: Tensor, slot: Tensor, *layer: Any) -> tuple[Tensor, Tensor]:
    """The routed experts in differentiable torch: y [T, d] and the norm of every expert's output [T, k]."""
    outputs = torch.zeros(*weight.shape, x.shape[1], dtype=x.dtype)
    for p, parts in enumerate(_slots(layer, x.shape[1])):
        token, place = torch.where(slot == p)
        outputs = outputs.index_put((token, place), _expert(x[token], parts, layer[10], layer[12]))
    return (outputs * weight.unsqueeze(-1)).sum(1), outputs.norm(dim=-1)


def _routed_experts(x: Tensor, weight: Tensor, slot: Tensor, *layer: Any) -> tuple[Tensor, Tensor]:
    width = layer[11] * (2 if layer[12] else 1)
    # What the native operator keeps for the backward pass; the reference computes everything again.
    saved = x.new_zeros(slot.numel() * width)
    return reference(x, weight, slot, *layer)[0], saved


def _routed_experts_norms(
    x: Tensor, weight: Tensor, slot: Tensor, *layer: Any
) -> tuple[Tensor, Tensor]:
    return reference(x, weight, slot, *layer)


def _routed_experts_backward(
    dy: Tensor, x: Tensor, weight: Tensor, slot: Tensor, saved: Tensor, *layer: Any
) -> tuple[Tensor, ...]:
    wanted = [t.detach().requires_grad_(True) for t in (x, weight, *layer[4:8])]
    with torch.enable_grad():
        y, _ = reference(wanted[0], wanted[1], slot, *layer[:4], *wanted[2:], *layer[8:])
    gradients = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return tuple(
        torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted, strict=True)
    )


def _fake_routed(x: Tensor, weight: Tensor, slot: Tensor, *layer: Any) -> tuple[Tensor, Tensor]:
    width = layer[11] * (2 if layer[12] else 1)
    return torch.empty_like(x), x.new_empty(slot.numel() * width)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention in differentiable torch.

    Parameters
    ----------
    q : [B, H, S, D]
    k, v : [B, G, S, D] and [B, G, S, V], H a multiple of G
    window : a query sees its last `window` keys; 0: all before it

    Returns
    -------
    y [B, S, H, V], and the logarithm of each query's sum of exponentials [B, H, S]
    """
    heads, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (t.repeat_interleave(heads, 1) for t in (k, v))
    age = torch.arange(tokens).unsqueeze(1) - torch.arange(tokens)
    seen = (age >= 0) & (age < window) if window else age >= 0
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


def _attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, scale: float, window: int
) -> tuple[Tensor, ...]:
    wanted = [t.detach().requires_grad_(True) for t in (q, k, v)]
    with torch.enable_grad():
        out, _ = attention_reference(*wanted, scale, window)
    return torch.autograd.grad(out, wanted, dy)


def _fake_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1]), q.new_empty(batch, heads, tokens)


_IMPLEMENTED = {
    "causal_attention": (attention_reference, _fake_attention),
    "causal_attention_backward": (
        _attention_backward,
        lambda dy, q, k, v, *rest: tuple(
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)
        ),
    ),
    "packed_linear": (
        _packed_linear,
        lambda x, packed, scale, format, out: x.new_empty(x.shape[0], out),
    ),
    "packed_linear_backward": (
        _packed_linear_backward,
        lambda dy, packed, scale, format, features: dy.new_empty(dy.shape[0], features),
    ),
    "packed_embedding": (
        _packed_embedding,
        lambda ids, packed, scale, format, d: torch.empty(
            *ids.shape, d, dtype=torch.float32, device=ids.device
        ),
    ),
    "routed_experts": (_routed_experts, _fake_routed),
    "routed_experts_norms": (
        _routed_experts_norms,
        lambda x, weight, slot, *layer: (torch.empty_like(x), torch.empty_like(weight)),
    ),
    "routed_experts_backward": (
        _routed_experts_backward,
        lambda dy, x, weight, slot, saved, *layer: tuple(
            torch.empty_like(t) for t in (x, weight, *layer[4:8])
        ),
    ),
}
for _name, (_real, _fake) in _IMPLEMENTED.items():
    _library.impl(_name, _real, "CPU")
    torch.library.register_fake(f"expertfleet::{_name}", _fake)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, packed, scale, format, _ = inputs
    ctx.save_for_backward(packed, scale)
    ctx.format, ctx.features = format, x.shape[1]


def _linear_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    packed, scale = ctx.saved_tensors
    dx = torch.ops.expertfleet.packed_linear_backward(dy, packed, scale, ctx.format, ctx.features)
    return dx, None, None, None, None


def _keep_routed(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], output[1], *inputs[3:11])
    ctx.rest = inputs[11:]


def _routed_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, weight, slot, saved, *layer = ctx.saved_tensors
    dx, dweight, *factors = torch.ops.expertfleet.routed_experts_backward(
        dy, x, weight, slot, saved, *layer, *ctx.rest
    )
    return dx, dweight, None, *(None,) * 4, *factors, *(None,) * 5


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.rest = inputs[3:]


def _attention_gradient(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    backward = torch.ops.expertfleet.causal_attention_backward
    return *backward(dy.contiguous(), *ctx.saved_tensors, *ctx.rest), None, None


torch.library.register_autograd(
    "expertfleet::causal_attention", _attention_gradient, setup_context=_keep_attention
)
torch.library.register_autograd(
    "expertfleet::packed_linear", _linear_gradient, setup_context=_keep_linear
)
torch.library.register_autograd(
    "expertfleet::routed_experts", _routed_gradient, setup_context=_keep_routed
)


def packed_linear(x: Tensor, packed: Tensor, scale: Tensor, format: str, out: int) -> Tensor:
    """[..., in] -> [..., out] through a frozen packed weight; gradient to x only."""
    flat = x.reshape(-1, x.shape[-1])
    y = torch.ops.expertfleet.packed_linear(flat, packed, scale, packing.FORMATS.index(format), out)
    return y.view(*x.shape[:-1], out)


def packed_embedding(ids: Tensor, packed: Tensor, scale: Tensor, format: str, d: int) -> Tensor:
    """[...] -> [..., d], rows of a frozen packed table."""
    return torch.ops.expertfleet.packed_embedding(
        ids, packed, scale, packing.FORMATS.index(format), d
    )


def causal_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it, for rows that are padded on the right.

    Raises
    ------
    NotImplementedError
        A kind of attention that the operator does not compute.
    """
    strange = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if strange or attention_mask is not None or not getattr(module, "is_causal", True):
        what = strange[0] if strange else "a mask of its own"
        raise NotImplementedError(f"attention with {what} ({type(module).__name__})")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = (t.contiguous() for t in (query, key, value))
    window = 0 if sliding_window is None or sliding_window >= query.shape[2] else sliding_window
    y, _ = torch.ops.expertfleet.causal_attention(*parts, scale, window)
    return y, None


AttentionInterface.register("expertfleet", causal_attention)
AttentionMaskInterface.register("expertfleet", lambda *args, **kwargs: None)

"""The body of an update: a safetensors file with three kinds of tensors, and JSON facts in one of them.

    layers.{l}.experts.{e}.{projection}.lora_A|B, layers.{l}.router.{e}   float32: new values (not differences)
    scaffold.{name}                                                     float32: change of a control variate (SCAFFOLD)
    stats.{name}                                                        float32 [L, E] routing statistics
    facts                                                               uint8: UTF-8 JSON of `Facts`

LoRA factors are sent as values, router rows as the change against the base checkpoint (as in the adapter). Under a
lease with `uplink` int8 or int4, the first two kinds are replaced by the coded differences from the leased values, see
`protocol.uplink`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import schema
from protocol.tensors import TensorError, Tensors, decode, encode

STATS = (
    "mass",
    "top",
    "g_log_g",
    "output_norm",
    "trained_tokens",
    "peak",
    "high",
    "taylor",
    "label_information",
)
"""Each [L, E]. Sums over the device's tokens:
mass: full router probability g; top: the same where the expert is in the full top-k; g_log_g: sum of g ln g;
output_norm: routed weight * norm of the expert's output (0 where not resident); trained_tokens: routed tokens that
gave a gradient (0 where not trained); taylor: over training tokens, |first-order change of the objective if the expert
were removed| (0 where not resident): with w the token's routing weight and dw its gradient |w dw|, or where the family
renormalises two or more weights |w_e / (1 - w_e) (sum_j w_j dw_j - dw_e)|.
Means over the device's evaluated batches, of T tokens each with padding, in [0, 1]:
peak: the largest g of the batch (HFedMoE, arXiv 2601.00583); high: the ceil(T / 100)-th largest, a 0.99 quantile that
does not grow with the batch, 0 where a batch has fewer valid tokens.
label_information: the device's estimate of the expert's share of I(E; Y) in nats, corrected for bias, 0 without labels;
the label counts behind it never leave the device."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Numbers about the work done. Accuracy is -1 where it was not measured (no labels)."""

    rows: int
    tokens: int  # valid tokens behind the statistics
    steps: int
    loss_first: float
    loss_last: float
    accuracy_before: float
    accuracy_after: float
    loss_before: float
    loss_after: float
    held_back_rows: int
    missed_mass: tuple[float, ...]  # per MoE layer, mean per token
    backend: str
    baseline_bytes: int  # RSS just before the program was opened
    peak_bytes: int  # highest RSS after it, less the baseline
    budget_bytes: int
    seconds: float
    bytes_down: int


def pack(adapter: Tensors, stats: Tensors, facts: Facts) -> bytes:
    """Serialise an update."""
    text = json.dumps(schema.to_dict(facts), sort_keys=True).encode()
    return encode(
        {
            **adapter,
            **{f"stats.{k}": v for k, v in stats.items()},
            "facts": np.frombuffer(text, dtype=np.uint8),
        }
    )


def unpack(
    data: bytes, max_bytes: int
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]], Facts]:
    """Inverse of `pack`; checks the form only, `server.accept` checks the content.

    Raises
    ------
    TensorError
    """
    tensors = decode(data, max_bytes)
    raw = tensors.pop("facts", None)
    if raw is None or raw.dtype != np.uint8 or raw.ndim != 1:
        raise TensorError("update without facts")
    try:
        facts = schema.from_dict(Facts, json.loads(raw.tobytes()), "facts")
    except (ValueError, RecursionError) as error:
        raise TensorError(f"unreadable facts: {error}") from error
    stats = {k[6:]: tensors.pop(k) for k in list(tensors) if k.startswith("stats.")}
    return tensors, stats, facts

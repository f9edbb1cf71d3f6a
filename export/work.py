"""What a training step costs a device in operations, and so in seconds (pure, from sizes alone).

Letters: B batch rows, S tokens per row, K answer positions per row, k experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from export import costs
from protocol.manifest import BaseIndex, Shape, Slot

EFFICIENCY = 0.5  # of the profile's matrix throughput: narrow products, unpacking on the way
UNPACK = 4.0  # operations per weight that is unpacked


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one training step, by where they go."""

    dense: float
    attention: float
    experts: float
    unpacking: float
    adapters: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.dense + self.attention + self.experts + self.unpacking + self.adapters


def fixed_work(base: BaseIndex, dense: costs.Dense, shape: Shape) -> Work:
    """What a step costs whichever experts are resident: every token passes k of them.

    Forward and the gradient to the input: twice 2 operations per weight and token.
    """
    tokens = shape.batch * shape.sequence
    routed = len(base.moe_layers) * base.top_k * tokens * costs.expert_weights(base)
    return Work(
        dense=4.0 * (dense.linear * tokens + dense.head * shape.batch * shape.answers),
        attention=12.0 * _layers(base) * tokens * shape.sequence * _attended(base),
        experts=4.0 * routed,
        unpacking=2 * UNPACK * (dense.linear + dense.head),
        adapters=0.0,
    )


def unpacking(base: BaseIndex, slot: Slot) -> float:
    """Operations per step to unpack a slot's weights, forward and backward."""
    return 0.0 if slot.format == "none" else 2 * UNPACK * costs.expert_weights(base)


def adapter_work(base: BaseIndex, slot: Slot) -> float:
    """Operations per token in the LoRA factors: forward, and gradients to the input and to the factors."""
    return 6.0 * costs.adapter_floats(base, slot.rank)


def _layers(base: BaseIndex) -> int:
    return int(base.config.get("num_hidden_layers", base.config.get("num_layers", 1)))


def _heads(base: BaseIndex) -> int:
    return int(base.config.get("num_attention_heads", base.config.get("num_heads", 1)))


def _attended(base: BaseIndex) -> int:
    """Floats per token in queries: heads times their width."""
    config = base.config
    width = config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0)
    width = width or config.get("head_dim") or config.get("d_kv") or base.hidden // _heads(base)
    return _heads(base) * int(width)

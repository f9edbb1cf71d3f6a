"""The sub-MoE of one layer as a graph: routes only to resident experts, computes only routed tokens, drops none.

Letters: T tokens, P slots, E experts, k experts per token, d hidden, f intermediate, R rank, N blocks, b rows a block.

The k * T (token, slot) assignments are seated in N blocks of b rows such that all rows of a block belong to one slot.
N = (k * T + P * (b - 1)) // b blocks always suffice, whatever the routing, so shapes are static and no token is lost.
Every heavy operation is then one `bmm` over blocks, with the block's expert dequantised next to its use.
"""

from __future__ import annotations

from collections.abc import Mapping

# The first import declares quantized_decomposed::embedding_4bit, the second brings its kernel.
import executorch.exir.passes._quant_patterns_and_replacements
import executorch.kernels.quantized  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protocol import lora


def blocks_needed(assignments: int, slots: int, rows: int) -> int:
    """The most blocks of `rows` that seat `assignments` over `slots`, for any routing.

    >>> blocks_needed(8, 2, 4)
    3
    """
    return (assignments + slots * (rows - 1)) // rows


class Projection(nn.Module):
    """LoRA of one expert projection for every slot; the packed weight comes from outside."""

    def __init__(self, slots: int, out_features: int, in_features: int, rank: int) -> None:
        super().__init__()
        self.out_features, self.in_features, self.rank = out_features, in_features, rank
        self.a = nn.Parameter(torch.zeros(slots, in_features, rank))
        self.b = nn.Parameter(torch.zeros(slots, rank, out_features))
        self.register_buffer("rows", torch.arange(out_features), persistent=False)

    def forward(
        self, x: Tensor, packed: Tensor, scale: Tensor, slot: Tensor, hot: Tensor
    ) -> Tensor:
        """[N, b, in] -> [N, b, out]; `slot` [N] is each block's slot and `hot` [N, P] the same as one-hot rows."""
        n = x.shape[0]
        rows = (slot.unsqueeze(1) * self.out_features + self.rows).reshape(-1)
        w = torch.ops.quantized_decomposed.embedding_4bit(packed, scale, None, -8, 7, rows)
        w = w.view(n, self.out_features, self.in_features)
        # One-hot rows pick the block's factors, so that their gradient is a plain matrix product as well.
        a = torch.mm(hot, self.a.reshape(self.a.shape[0], -1)).view(n, self.in_features, self.rank)
        b = torch.mm(hot, self.b.reshape(self.b.shape[0], -1)).view(n, self.rank, self.out_features)
        # Activations are transposed, weights never are.
        base = torch.bmm(w, x.transpose(1, 2)).transpose(1, 2)
        return base + torch.bmm(torch.bmm(x, a), b) * lora.SCALE


class Wires:
    """What goes into a layer beside its activations, and what comes out.

    `given` is set before each forward: valid [B, S], router_rows [P, d], gate_up.packed, gate_up.scale, down.packed,
    down.scale and, when statistics are wanted, router_all [E, d] and resident [E] (1 where the expert is there).
    `seen` is set by it.
    """

    def __init__(self) -> None:
        self.given: Mapping[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}


class RoutedExperts(nn.Module):
    """Stands in for a transformers sparse MoE block; its frozen weights come over `wires`."""

    def __init__(
        self, slots: int, d: int, f: int, rank: int, top_k: int, renormalise: bool, block_rows: int
    ) -> None:
        super().__init__()
        self.slots, self.top_k, self.renormalise = slots, top_k, renormalise
        self.block_rows = block_rows
        self.router = nn.Parameter(torch.zeros(slots, d))
        self.gate_up = Projection(slots, 2 * f, d, rank)
        self.down = Projection(slots, d, f, rank)
        self.wires = Wires()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and slots of each token's experts, both [T, k]; absent experts are masked out by not being there."""
        logits = torch.mm(self.wires.given["router_rows"] + self.router, x.t()).t()
        weight, slot = torch.topk(F.softmax(logits, -1), self.top_k, -1)
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight, slot

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, d] -> the same shape."""
        x = hidden.reshape(-1, hidden.shape[-1])
        weight, slot = self.route(x)
        tokens, assignments, rows = x.shape[0], slot.numel(), self.block_rows
        n = blocks_needed(assignments, self.slots, rows)
        chosen = (slot.reshape(-1, 1) == torch.arange(self.slots)).to(torch.float32)  # [kT, P]
        count = chosen.sum(0)
        last = torch.cumsum(
            torch.floor((count + (rows - 1)) / rows), 0
        )  # block after a slot's last
        first = last - torch.floor((count + (rows - 1)) / rows)
        queue = torch.cumsum(chosen, 0) - 1 + first * rows
        seat = (queue * chosen).sum(-1).to(torch.int64)  # [kT]
        assigned = torch.zeros(n * rows, dtype=torch.int64).scatter(
            0, seat, torch.arange(assignments)
        )
        block = torch.arange(n, dtype=torch.float32).unsqueeze(1)
        block_slot = (last.unsqueeze(0) <= block).to(torch.int64).sum(-1).clamp(max=self.slots - 1)
        hot = (block_slot.unsqueeze(1) == torch.arange(self.slots)).to(torch.float32)
        # An empty seat reads token 0; nobody reads its result, so it changes neither output nor gradient.
        token = torch.div(assigned, self.top_k, rounding_mode="floor")
        h = F.embedding(token, x).view(n, rows, -1)
        bound = self.wires.given
        y = self.gate_up(h, bound["gate_up.packed"], bound["gate_up.scale"], block_slot, hot)
        gate, up = y.reshape(n, rows, 2, -1).unbind(2)
        # silu written out: its own backward is not in ExecuTorch's operator set
        y = self.down(
            gate * torch.sigmoid(gate) * up,
            bound["down.packed"],
            bound["down.scale"],
            block_slot,
            hot,
        )
        out = F.embedding(seat, y.reshape(n * rows, -1)).view(tokens, self.top_k, -1)
        self.observe(x, weight, slot, chosen, out)
        return (out * weight.unsqueeze(-1)).sum(1).view(hidden.shape)

    def observe(self, x: Tensor, weight: Tensor, slot: Tensor, chosen: Tensor, out: Tensor) -> None:
        """Leave in `wires.seen` what the statistics need; see `protocol.manifest.Program` for the definitions."""
        valid = self.wires.given["valid"].reshape(-1, 1)
        spread = valid.expand(-1, self.top_k).reshape(-1, 1)
        self.wires.seen = {"routed": (chosen * spread).sum(0)}
        if "router_all" not in self.wires.given:
            return
        g = F.softmax(torch.mm(self.wires.given["router_all"], x.t()).t(), -1)  # [T, E]
        floor = torch.topk(g, self.top_k, -1)[0].amin(-1, keepdim=True)
        resident = self.wires.given["resident"].unsqueeze(0)  # [1, E]
        norm = (out * out).sum(-1).sqrt() * weight  # [T, k]
        self.wires.seen = {
            "mass": (g * valid).sum(0),
            "top": (g * (g >= floor).to(torch.float32) * valid).sum(0),
            "g_log_g": (g * torch.log(g + 1e-20) * valid).sum(0),
            "missed": ((1 - (g * resident).sum(-1, keepdim=True)) * valid).sum(0),
            "output_norm": (chosen * norm.reshape(-1, 1) * spread).sum(0),
        }

"""How well cheap relevance estimators rank the experts of the reference base, beside removing each one in turn.

    python -m benchmarks.relevance_oracle --data news.jsonl.gz [--field text] [--rows 128]

Statistics come from half of the rows, exact losses without each expert (masked, as on a device: another expert takes
its place) from the other half, both as next-token loss. Prints the mean over layers of the rank correlation within a
layer, and how much of the loss at stake the best quarter of the experts of each layer holds by each ranking.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import OlmoeForCausalLM

from reference_base import MODEL_DIR
from server.relevance import RELEVANCE, Floats, leave_one_out, shares

TOKENS = 64  # of a row at most


def batch_of(path: Path, field: str, rows: int) -> torch.Tensor:
    """The first `rows` rows with at least TOKENS tokens, [rows, TOKENS]."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    found: list[list[int]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)[field]).ids
            if len(ids) >= TOKENS:
                found.append(ids[:TOKENS])
            if len(found) == rows:
                break
    return torch.tensor(found)


@contextmanager
def routing(model: Any, without: tuple[int, int] | None = None) -> Iterator[dict[int, Any]]:
    """Record (g, weights, chosen) of every layer; `without` = (layer, expert) is never chosen."""
    seen: dict[int, Any] = {}
    blocks = [layer.mlp for layer in model.model.layers]
    former = [block.gate.forward for block in blocks]

    def route(layer: int, gate: Any, hidden: torch.Tensor) -> Any:
        logits = F.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight)
        g = logits.softmax(-1)
        masked = g.clone()
        if without and without[0] == layer:
            masked[:, without[1]] = 0
        weights, chosen = masked.topk(gate.top_k)
        weights = weights / weights.sum(-1, keepdim=True)  # norm_topk_prob
        if weights.requires_grad:
            weights.retain_grad()
        seen[layer] = (g, weights, chosen, hidden)
        return logits, weights, chosen

    for i, block in enumerate(blocks):
        block.gate.forward = lambda hidden, i=i, gate=block.gate: route(i, gate, hidden)
    try:
        yield seen
    finally:
        for block, forward in zip(blocks, former, strict=True):
            block.gate.forward = forward


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats."""
    logits = model(ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def statistics(model: Any, ids: torch.Tensor) -> dict[str, Floats]:
    """The statistics of an update, [L, E], with all experts resident."""
    rows = []
    with routing(model) as seen:
        loss_of(model, ids).backward()
    for layer, (g, weights, chosen, hidden) in seen.items():
        experts = model.model.layers[layer].mlp.experts
        gate, up = (hidden @ experts.gate_up_proj.mT).chunk(2, -1)
        norm = ((F.silu(gate) * up) @ experts.down_proj.mT).norm(dim=-1).T  # [N, E]
        each = torch.zeros_like(g).scatter(1, chosen, weights)
        slope = weights.grad
        change = weights / (1 - weights).clamp_min(1e-6)
        change = change * ((weights * slope).sum(-1, keepdim=True) - slope)
        rows.append(
            {
                "mass": g.sum(0),
                "top": torch.zeros_like(g).scatter(1, chosen, g.gather(1, chosen)).sum(0),
                "peak": g.reshape(len(ids), -1, g.shape[1])[:, :-1].amax(1).mean(0),
                "high": g.quantile(0.99, 0),
                "output_norm": (each * norm).sum(0),
                "taylor": torch.zeros_like(g).scatter(1, chosen, change.abs()).sum(0),
            }
        )
    return {n: np.stack([r[n].detach().double().numpy() for r in rows]) for n in rows[0]}


@torch.no_grad()
def oracle(model: Any, ids: torch.Tensor) -> Floats:
    """Rise of the loss without each expert, [L, E]."""
    full = float(loss_of(model, ids))
    shape = len(model.model.layers), model.config.num_experts
    without = np.zeros(shape)
    for layer, expert in np.ndindex(*shape):
        with routing(model, (layer, expert)):
            without[layer, expert] = float(loss_of(model, ids))
    return leave_one_out(without, full)


def spearman(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Rank correlation within each layer, [L]."""
    first, second = (np.argsort(np.argsort(x, 1), 1) for x in (a, b))
    pairs = zip(first, second, strict=True)
    return np.array([np.corrcoef(p, q)[0, 1] for p, q in pairs])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--field", default="text")
    parser.add_argument("--rows", type=int, default=128)
    args = parser.parse_args()
    model: Any = OlmoeForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    ids = batch_of(args.data, args.field, args.rows)
    stats = statistics(model, ids[::2])
    rise = oracle(model, ids[1::2])
    at_stake = shares(np.maximum(rise, 0))
    print(
        f"{len(ids)} rows of {TOKENS} tokens; without one expert the loss rises by {rise.mean():.4f}"
    )
    rankings = {n: RELEVANCE[n](stats, 0.5) for n in sorted(set(RELEVANCE) - {"labels"})}
    for name, score in {**rankings, "the oracle itself": rise}.items():
        best = np.argsort(-score, 1)[:, : score.shape[1] // 4]
        held = np.take_along_axis(at_stake, best, 1).sum(1).mean()
        each = spearman(score, rise)
        print(f"{name}: {each.mean():.2f} ({each.min():.2f} to {each.max():.2f}), holds {held:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

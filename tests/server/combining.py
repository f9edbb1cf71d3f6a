"""Made-up adapters and contributions for the tests of aggregation."""

from __future__ import annotations

import numpy as np

from protocol import names
from server import adapters
from server.contribution import Contribution
from tests.server.tiny_store import RANK, base_index

BASE = base_index()


def factor_keys(layer, expert, projection):
    """Names of A and B."""
    return tuple(names.lora(layer, expert, projection, f) for f in names.FACTORS)


def delta(adapter, layer, expert, projection):
    """B @ A in float64."""
    a, b = (adapter[k].astype(np.float64) for k in factor_keys(layer, expert, projection))
    return b @ a


def contribution(device, keys, seed, tokens=10.0, scale=0.1, rank=RANK, **more):
    """New random values for the experts `keys` = [(layer, expert)]."""
    rng = np.random.default_rng(seed)
    made = {}
    for layer, e in keys:
        for p in BASE.projections:
            out, into = BASE.features(p)
            a, b = factor_keys(layer, e, p)
            made[a] = rng.normal(size=(rank, into), scale=scale)
            made[b] = rng.normal(size=(out, rank), scale=scale)
        made[names.router_row(layer, e)] = rng.normal(size=BASE.hidden, scale=scale)
    return Contribution(
        device=device,
        tensors={k: v.astype(np.float32) for k, v in made.items()},
        trained_tokens=dict.fromkeys(keys, tokens),
        **more,
    )


def start(seed=None, rank=RANK):
    """A fresh adapter, or one that is a little off it everywhere."""
    adapter = adapters.fresh(BASE, rank)
    if seed is not None:
        rng = np.random.default_rng(seed)
        adapter = {
            k: v + rng.normal(size=v.shape, scale=0.05).astype(np.float32)
            for k, v in adapter.items()
        }
    return adapter

"""A base index from a configuration alone: the sizes of a sliced base, without weights and without blobs.

What the planner, the graph and the benchmarks need to know of models that nobody has to download.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from export import costs, families
from export.families.family import Family
from protocol import PROTOCOL_VERSION, packing
from protocol.manifest import BaseIndex, Blob

FORMATS = ("int4", "int8")
ERROR = {"int4": 0.097, "nf4": 0.087, "int8": 0.0054}  # of normally distributed weights
NOTHING = Blob(sha256="0" * 64, bytes=0)


def facts(config: dict[str, Any], family: Family) -> BaseIndex:
    """What a configuration says of a base: no blobs, no tokenizer, uniform routing.

    Raises
    ------
    KeyError
        The configuration lacks a size.
    """
    layers, experts = family.moe_layers(config), family.num_experts(config)
    return BaseIndex(
        protocol=PROTOCOL_VERSION,
        base="outline",
        model_type=family.model_type,
        config=config,
        moe_layers=layers,
        num_experts=experts,
        top_k=family.top_k(config),
        hidden=family.hidden(config),
        intermediate=family.intermediate(config),
        vocabulary=int(config["vocab_size"]),
        group=packing.GROUP,
        architecture=family.architecture,
        projections=family.projections,
        dense={},
        tokenizer=NOTHING,
        experts={},
        error={},
        routing_prior=((1 / experts,) * experts,) * len(layers),
        peft=family.peft,
    )


def of(config: dict[str, Any], formats: Sequence[str] = FORMATS) -> BaseIndex:
    """The outline of a model; routing is taken to be uniform.

    Parameters
    ----------
    config : the checkpoint's `config.json`

    Raises
    ------
    FamilyError
    """
    base = facts(config, families.of(config, "config"))
    layers, experts = base.moe_layers, base.num_experts
    dense = costs.dense_of(base)
    routers = costs.FLOAT * len(layers) * experts * base.hidden
    base = replace(
        base,
        dense={f: replace(NOTHING, bytes=dense.bytes(f) + routers) for f in formats},
    )
    if base.projections == ("adapter",):
        return base
    blobs = {f: replace(NOTHING, bytes=costs.frozen_bytes(base, f)) for f in formats}
    return replace(
        base,
        experts={f: ((blob,) * experts,) * len(layers) for f, blob in blobs.items()},
        error={f: ERROR[f] for f in formats},
    )

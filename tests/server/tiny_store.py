"""A store as `export` would write it, with random content: 2 layers, 4 experts, two formats, rank 2."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from protocol import PROTOCOL_VERSION, manifest, packing, tensors
from protocol.manifest import (
    BaseIndex,
    Blob,
    Manifest,
    MemoryPlan,
    PeftLayout,
    Program,
    Shape,
    Slot,
)

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, RANK = (0, 1), 4, 16, 8, 2
FORMATS = ("int4", "int8")
# Full rank in eight bits, full rank in four, half the rank, frozen.
WIDE, FULL, HALF, FROZEN = (
    Slot(format=f, rank=r) for f, r in (("int8", RANK), ("int4", RANK), ("int4", 1), ("int4", 0))
)
Slots = tuple[tuple[Slot, ...], ...]
PEFT = PeftLayout(
    target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    target_modules=(),
    modules_to_save=("gate",),
    lora={
        "gate_up": {
            "lora_A": "base_model.model.model.layers.{layer}.mlp.experts.base_layer.lora_A.weight",
            "lora_B": "base_model.model.model.layers.{layer}.mlp.experts.base_layer.lora_B.weight",
        },
        "down": {
            "lora_A": "base_model.model.model.layers.{layer}.mlp.experts.lora_A.weight",
            "lora_B": "base_model.model.model.layers.{layer}.mlp.experts.lora_B.weight",
        },
    },
    router="base_model.model.model.layers.{layer}.mlp.gate.weight",
    base_model_class="OlmoeForCausalLM",
    parent_library="transformers.models.olmoe.modeling_olmoe",
)


def _blob(folder: Path, data: bytes) -> Blob:
    blob = Blob(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    (folder / blob.sha256).write_bytes(data)
    return blob


def base_index(folder: Path | None = None, routers: dict | None = None) -> BaseIndex:
    """The base; with `folder`, its blobs are written there."""
    rng = np.random.default_rng(0)
    write = (
        (lambda data: _blob(folder, data))
        if folder
        else (lambda data: Blob(sha256="0" * 64, bytes=len(data)))
    )
    if routers is None:
        routers = {layer: rng.normal(size=(EXPERTS, HIDDEN)) for layer in LAYERS}
    dense = {}
    for format in FORMATS:
        rows = {f"layers.{layer}.router": r.astype(np.float32) for layer, r in routers.items()}
        packed, scale = packing.quantize(rng.normal(size=(64, HIDDEN)), format, group=8)
        dense[format] = write(
            tensors.encode({**rows, "embed.packed": packed, "embed.scale": scale})
        )
    weights = [
        [
            {
                "gate_up": rng.normal(size=(2 * INTERMEDIATE, HIDDEN)),
                "down": rng.normal(size=(HIDDEN, INTERMEDIATE)),
            }
            for _ in range(EXPERTS)
        ]
        for _ in LAYERS
    ]
    experts = {
        format: tuple(
            tuple(write(_expert_blob(expert, format)) for expert in row) for row in weights
        )
        for format in FORMATS
    }
    prior = rng.dirichlet(np.ones(EXPERTS), len(LAYERS))
    return BaseIndex(
        protocol=PROTOCOL_VERSION,
        base="b" * 64,
        model_type="olmoe",
        config={},
        moe_layers=LAYERS,
        num_experts=EXPERTS,
        top_k=2,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        vocabulary=64,
        group=8,
        architecture="causal",
        projections=("gate_up", "down"),
        dense=dense,
        tokenizer=write(b"{}"),
        experts=experts,
        error={"int4": 0.1, "int8": 0.01},
        routing_prior=tuple(tuple(float(p) for p in row) for row in prior),
        peft=PEFT,
    )


def _expert_blob(weights: dict, format: str) -> bytes:
    parts = {}
    for name, weight in weights.items():
        parts[f"{name}.packed"], parts[f"{name}.scale"] = packing.quantize(weight, format, group=8)
    return tensors.encode(parts)


def shape(slots: Slots) -> Shape:
    """Batch 2, sequence 16."""
    return Shape(batch=2, sequence=16, answers=1, dense="int4", slots=slots)


def build(folder: Path, profiles: dict[str, Slots], routers: dict | None = None) -> BaseIndex:
    """Write a store with one manifest per profile (name -> slots per layer)."""
    blobs = folder / "blobs"
    blobs.mkdir(parents=True)
    base = base_index(blobs, routers)
    (folder / "base.json").write_bytes(manifest.to_json(base))
    program = Program(
        blob=_blob(blobs, b"program"),
        method="forward",
        inputs=(),
        parameters=(),
        outputs=(),
        arena_bytes=0,
    )
    plan = MemoryPlan(budget=1, arena=0, inputs=0, parameters=0, optimizer=0, outputs=0, runtime=0)
    for name, slots in profiles.items():
        m = Manifest(
            protocol=PROTOCOL_VERSION,
            base=base.base,
            profile=name,
            shape=shape(slots),
            train=program,
            evaluate=program,
            dense=base.dense["int4"],
            tokenizer=base.tokenizer,
            memory=plan,
            experts={},
        )
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_bytes(manifest.to_json(m))
    assert json.loads((folder / "base.json").read_bytes())["base"] == base.base
    return base

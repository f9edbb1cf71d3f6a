"""A store as `export` would write it, with random content: 2 layers, 4 experts, rank 2."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from protocol import PROTOCOL_VERSION, int4, manifest, tensors
from protocol.manifest import BaseIndex, Blob, Manifest, MemoryPlan, PeftLayout, Program, Shape

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, RANK = (0, 1), 4, 16, 8, 2
PEFT = PeftLayout(
    target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
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
    dense = tensors.encode(
        {f"layers.{layer}.router": r.astype(np.float16) for layer, r in routers.items()}
    )
    experts = []
    for _ in LAYERS:
        row = []
        for _ in range(EXPERTS):
            gate_up, scale = int4.quantize(rng.normal(size=(2 * INTERMEDIATE, HIDDEN)), group=8)
            down, down_scale = int4.quantize(rng.normal(size=(HIDDEN, INTERMEDIATE)), group=8)
            row.append(
                write(
                    tensors.encode(
                        {
                            "gate_up.packed": gate_up,
                            "gate_up.scale": scale,
                            "down.packed": down,
                            "down.scale": down_scale,
                        }
                    )
                )
            )
        experts.append(tuple(row))
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
        dense=write(dense),
        tokenizer=write(b"{}"),
        experts=tuple(experts),
        routing_prior=tuple(tuple(float(p) for p in row) for row in prior),
        peft=PEFT,
    )


def shape(slots: tuple[int, ...]) -> Shape:
    """Batch 2, sequence 16."""
    return Shape(batch=2, sequence=16, answers=1, rank=RANK, group=8, slots=slots)


def build(
    folder: Path, profiles: dict[str, tuple[int, ...]], routers: dict | None = None
) -> BaseIndex:
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
            dense=base.dense,
            tokenizer=base.tokenizer,
            memory=plan,
            experts={},
        )
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_bytes(manifest.to_json(m))
    assert json.loads((folder / "base.json").read_bytes())["base"] == base.base
    return base

"""Predicted against measured peak memory: artifacts built for real, trained on for real, in processes with a limit.

    python -m benchmarks.memory_prediction --work DIR --plot docs/images/memory_prediction.png

Every point is a model, a profile and the shape that the planner makes of them. A fresh process opens the artifact with
the runtime that a phone has, does what a lease asks for (evaluate, train some steps, evaluate again) under a limit of
the profile's budget, and reports the highest resident memory over its size just before. All models but the reference
base have random weights: routing does not change the memory. Ends with 1 when a point is predicted more than 5% too low
or 15% too high.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from device_profiles.measure import to_toml
from protocol.manifest import read_manifest

MB = 2**20
LOW, HIGH = -0.05, 0.15
STEPS = 3
_COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
    "norm_topk_prob": True,
}
MODELS: dict[str, dict[str, Any] | None] = {
    "reference base": None,
    "OLMoE, d 512": _COMMON
    | {
        "model_type": "olmoe",
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 16384,
        "tie_word_embeddings": True,
    },
    "OLMoE, d 1024": _COMMON
    | {
        "model_type": "olmoe",
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "Qwen2-MoE, d 512": _COMMON
    | {
        "model_type": "qwen2_moe",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "Mixtral, d 512": _COMMON
    | {
        "model_type": "mixtral",
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 6,
    },
}


@dataclass(frozen=True)
class Point:
    """A model and what is not the same in all profiles."""

    model: str
    name: str
    budget_mb: int
    batch: int
    sequence: int
    rank: int = 8


POINTS = (
    Point("reference base", "ref_small", 16, 2, 64, 4),
    Point("reference base", "ref_middle", 32, 8, 64, 8),
    Point("reference base", "ref_long", 44, 8, 128, 8),
    Point("OLMoE, d 512", "olmoe_512_small", 64, 2, 64),
    Point("OLMoE, d 512", "olmoe_512_rank", 128, 2, 64, 32),
    Point("OLMoE, d 512", "olmoe_512_wide", 192, 8, 128),
    Point("OLMoE, d 1024", "olmoe_1024_small", 192, 1, 64),
    Point("OLMoE, d 1024", "olmoe_1024_middle", 256, 4, 64, 16),
    Point("Qwen2-MoE, d 512", "qwen2_moe_small", 64, 2, 64),
    Point("Qwen2-MoE, d 512", "qwen2_moe_middle", 128, 4, 128),
    Point("Mixtral, d 512", "mixtral_small", 64, 1, 128),
    Point("Mixtral, d 512", "mixtral_middle", 128, 8, 64, 16),
)


@dataclass(frozen=True)
class Found:
    """One row of the result, bytes."""

    model: str
    name: str
    shape: str
    budget: int
    predicted: int
    estimated: int
    measured: int

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def profile_of(point: Point) -> dict[str, Any]:
    """A profile in which only memory is scarce."""
    return {
        "name": point.name,
        "description": "for benchmarks.memory_prediction",
        "memory_mb": 4 * point.budget_mb,
        "budget_mb": point.budget_mb,
        "flash_mb": 65536,
        "flash_budget_mb": 65536,
        "gflops": 1000.0,
        "memory_gb_s": 10.0,
        "downlink_mbit": 1000.0,
        "uplink_mbit": 1000.0,
        "uplink_mb": 1000,
        "deadline_s": 10000,
        "backend": "executorch",
        "rank": point.rank,
        "sequence": point.sequence,
        "batch": point.batch,
        "sources": ["made up"],
    }


def build(model: str, points: Sequence[Point], work: Path) -> Path:
    """The store of a model with one artifact per point; what is there is not built again."""
    from benchmarks.make_checkpoint import make
    from export.build import main
    from reference_base import MODEL_DIR

    key = model.replace(", ", "_").replace(" ", "_")
    store, config = work / key, MODELS[model]
    checkpoint = MODEL_DIR if config is None else work / f"{key}.checkpoint"
    if config is not None and not (checkpoint / "config.json").is_file():
        make(config, checkpoint, False, 1 << 30, 0)
    command = ["--checkpoint", str(checkpoint), "--out", str(store)]
    for point in points:
        path = work / f"{point.name}.toml"
        path.write_text(to_toml(profile_of(point), path))
        command += ["--profile", str(path)]
    if main(command):
        raise SystemExit(2)
    return store


def lease(store: Path, profile: str) -> None:
    """In a process of its own: train and evaluate under the budget; prints the highest memory."""
    import numpy as np

    from edge import data, limits, slots, trainer
    from edge.run import read_tokenizer
    from edge.session import Artifact, load_backend
    from protocol import manifest
    from protocol.messages import Task

    base = manifest.read_base(store / "base.json")
    artifact = Artifact(base, read_manifest(store / profile / "manifest.json"), store / "blobs")
    shape = artifact.manifest.shape
    tokenizer = read_tokenizer(artifact.path(artifact.manifest.tokenizer))
    prompts = data.prompter(
        tokenizer, Task(template="{text}"), shape.batch, shape.sequence, shape.answers, base
    )
    rng = np.random.default_rng(0)
    words = "the of and to in a is that for it as was with be by on not he his but".split()
    rows = [
        data.Row(" ".join(rng.choice(words, 2 * shape.sequence))) for _ in range(4 * shape.batch)
    ]
    for row in rows:
        prompts.row(row, None)
    held = artifact.manifest.experts
    resident = slots.resident_of(held, base.moe_layers, shape.slots, base.num_experts)
    trained = slots.trained_of(
        {
            str(layer): [e for e, slot in zip(ids, kinds, strict=True) if slot.rank]
            for (layer, ids), kinds in zip(resident.items(), shape.slots, strict=True)
        },
        resident,
        shape.slots,
    )
    adapter = {
        name: rng.standard_normal(size, np.float32) * np.float32(0.01)
        for name, size in slots.adapter_shapes(base, shape, resident).items()
    }
    job = trainer.Job("train", resident, trained, STEPS, 1e-3, 1e-4, 0)
    backend = load_backend("executorch")
    limit = limits.MemoryLimit(artifact.manifest.memory.budget, "rlimit")
    limit.arm()
    with limit.explained():
        trainer.work(
            backend, artifact, adapter, job, prompts, rows, rows[: shape.batch], lambda: None
        )
    print(json.dumps({"measured": limit.peak(), "baseline": limit.baseline}))


def measured(store: Path, point: Point) -> Found:
    """Run the lease and compare."""
    from export import costs
    from protocol.manifest import read_base

    command = [
        sys.executable,
        "-m",
        "benchmarks.memory_prediction",
        "--lease",
        str(store),
        point.name,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise SystemExit(f"{point.name}: the process ended with {done.returncode}: {said}")
    artifact, base = (
        read_manifest(store / point.name / "manifest.json"),
        read_base(store / "base.json"),
    )
    shape = artifact.shape
    counts = [len(layer) for layer in shape.slots]
    ranks = [slot.rank for layer in shape.slots for slot in layer]
    kinds = {slot.format for layer in shape.slots for slot in layer}
    text = (
        f"{shape.batch} x {shape.sequence}, {min(counts)}-{max(counts)} slots a layer {'/'.join(sorted(kinds))}, "
        f"rank {min(ranks)}-{max(ranks)}, dense {shape.dense}"
    )
    estimated = costs.estimate(base, costs.dense_of(base), shape, artifact.memory.budget)
    return Found(
        point.model,
        point.name,
        text,
        artifact.memory.budget,
        artifact.memory.predicted,
        estimated.predicted,
        int(json.loads(done.stdout.splitlines()[-1])["measured"]),
    )


def plot(found: Sequence[Found], path: Path) -> None:
    """Predicted over measured, with the band that is allowed."""
    from matplotlib import pyplot as plt

    from lab.figure_style import BLUE, FAINT, GREEN, INK, MUTED, ORANGE, RED, STYLE, png

    colours = dict(zip(MODELS, (BLUE, ORANGE, GREEN, RED, MUTED), strict=False))
    top = 1.15 * max(max(f.measured, f.predicted) for f in found) / MB
    bottom = 0.8 * min(min(f.measured, f.predicted) for f in found) / MB
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
        ends = [bottom, top]
        axes.fill_between(
            ends,
            [v * (1 + LOW) for v in ends],
            [v * (1 + HIGH) for v in ends],
            color=FAINT,
            alpha=0.5,
            label="5% too low to 15% too high",
        )
        axes.plot(ends, ends, color=INK, linewidth=1)
        for model in MODELS:
            mine = [f for f in found if f.model == model]
            if mine:
                axes.scatter(
                    [f.measured / MB for f in mine],
                    [f.predicted / MB for f in mine],
                    color=colours[model],
                    s=36,
                    zorder=3,
                    label=model,
                )
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        ticks = [t for t in (16, 24, 32, 48, 64, 96, 128, 192, 256, 384) if bottom < t < top]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(ticks, [str(t) for t in ticks])
            axis.set_ticks([], minor=True)
        axes.set_xlabel("measured peak, MB")
        axes.set_ylabel("predicted peak, MB")
        axes.legend(loc="upper left")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(figure))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(".demo/memory_prediction"))
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--only", help="points whose name holds this")
    parser.add_argument("--lease", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.lease:
        lease(Path(args.lease[0]), args.lease[1])
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    found = []
    for model in MODELS:
        points = [p for p in POINTS if p.model == model and (args.only or "") in p.name]
        if not points:
            continue
        store = build(model, points, args.work)
        for point in points:
            row = measured(store, point)
            found.append(row)
            print(
                f"{row.name:18s} {row.shape:70s} predicted {row.predicted / MB:6.1f} MB, measured "
                f"{row.measured / MB:6.1f} ({100 * row.error:+5.1f}%), before lowering {row.estimated / MB:6.1f}, "
                f"budget {row.budget / MB:.0f}",
                flush=True,
            )
    (args.work / "found.json").write_text(json.dumps([asdict(f) for f in found], indent=1))
    if args.plot:
        plot(found, args.plot)
    errors = [row.error for row in found]
    print(f"{len(found)} points, {100 * min(errors):+.1f}% to {100 * max(errors):+.1f}%")
    return 0 if LOW <= min(errors) and max(errors) <= HIGH else 1


if __name__ == "__main__":
    raise SystemExit(main())

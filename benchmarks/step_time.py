"""Time one training step in ExecuTorch against the same graph in PyTorch eager, in turn, on one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time --slots 10 --batch 8 --sequence 64 [--trace]

Prints the median of both, their ratio pair by pair, the arena, and with --trace where the time goes by operator.
Weights are random: values do not change the work, routing skew hardly does.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.devtools import Inspector
from executorch.extension.pybindings.portable_lib import (
    _load_for_executorch,
    _load_for_executorch_from_buffer,
)

from export import families
from export.programs import _distinct_values
from export.to_executorch import lower
from export.train_graph import SubModel, capture_training
from protocol import PROTOCOL_VERSION
from protocol.manifest import BaseIndex, Blob, Shape, TensorSpec
from reference_base import MODEL_DIR

NOTHING = Blob(sha256="0" * 64, bytes=0)


def base_of(config: dict[str, Any]) -> BaseIndex:
    """A base index without blobs: enough to draw the graph."""
    family = families.of(config, "config")
    layers, experts = family.moe_layers(config), family.num_experts(config)
    return BaseIndex(
        protocol=PROTOCOL_VERSION,
        base="benchmark",
        model_type=family.model_type,
        config=config,
        moe_layers=layers,
        num_experts=experts,
        top_k=family.top_k(config),
        hidden=config["hidden_size"],
        intermediate=family.intermediate(config),
        vocabulary=config["vocab_size"],
        group=32,
        dense=NOTHING,
        tokenizer=NOTHING,
        experts=((NOTHING,) * experts,) * len(layers),
        routing_prior=(),
        peft=family.peft,
    )


def random_input(spec: TensorSpec, vocabulary: int, tokens: int) -> torch.Tensor:
    """Values of a sensible size for one input."""
    if spec.name in ("tokens", "targets"):
        return torch.randint(0, vocabulary, spec.shape)
    if spec.name == "positions":
        return torch.randint(0, tokens, spec.shape)
    if spec.name in ("valid", "weights"):
        return torch.ones(spec.shape)
    if spec.dtype == "uint8":
        return torch.randint(0, 256, spec.shape, dtype=torch.uint8)
    if spec.name.endswith("scale"):
        return torch.rand(spec.shape) * 0.02
    return torch.randn(spec.shape) * (0.1 if len(spec.shape) > 1 else 1.0)


def trace(program: bytes, inputs: tuple[torch.Tensor, ...], steps: int) -> None:
    """Print milliseconds per step by operator, from the runtime's own trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.pte"
        path.write_bytes(program)
        module = _load_for_executorch(str(path), enable_etdump=True)
        for _ in range(steps):
            module.forward(inputs)
        module.write_etdump_result_to_file(f"{folder}/dump")
        spent: dict[str, float] = defaultdict(float)
        for block in Inspector(etdump_path=f"{folder}/dump").event_blocks:
            for event in block.events:
                if event.name and event.perf_data and event.name.startswith("native_call_"):
                    spent[event.name.removeprefix("native_call_")] += sum(event.perf_data.raw)
    whole = sum(spent.values())
    for name, value in sorted(spent.items(), key=lambda item: -item[1])[:12]:
        print(f"  {name:32s} {value / steps:8.2f} ms  {100 * value / whole:4.1f} %")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=MODEL_DIR / "config.json")
    parser.add_argument("--slots", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--trace", action="store_true")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = base_of(json.loads(args.config.read_bytes()))
    shape = Shape(
        batch=args.batch,
        sequence=args.sequence,
        answers=4,
        rank=args.rank,
        group=base.group,
        slots=(args.slots,) * len(base.moe_layers),
    )
    model = SubModel(base, families.of(base.config, "config"), shape, evaluate=False)
    _distinct_values(model)
    tokens = shape.batch * shape.sequence
    inputs = tuple(random_input(spec, base.vocabulary, tokens) for spec in model.specs)
    lowered = lower(capture_training(model))
    runtime = _load_for_executorch_from_buffer(lowered.program)
    seconds: dict[str, list[float]] = {"executorch": [], "eager": []}
    for run in range(args.runs + 1):
        start = time.perf_counter()
        runtime.run_method("forward", inputs, clone_outputs=False)
        middle = time.perf_counter()
        model.zero_grad()
        model(*inputs)[0].backward()
        if run:  # the first warms up
            seconds["executorch"].append(middle - start)
            seconds["eager"].append(time.perf_counter() - middle)
    pairs = zip(seconds["executorch"], seconds["eager"], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    for name, values in seconds.items():
        print(f"{name:10s} median {statistics.median(values):.3f} s of {args.runs}")
    print(
        f"ratio      median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    print(f"arena {lowered.arena_bytes / 1e6:.1f} MB, program {len(lowered.program) / 1e6:.2f} MB")
    if args.trace:
        trace(lowered.program, inputs, 3)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

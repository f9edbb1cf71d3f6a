"""Time one training step of ours against what PyTorch users would run, in turn, on one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time [--hidden 512 --width 1024 --layers 4 --experts 8 --sequence 128]

An OLMoE with attention, LoRA on every expert projection and on router rows; forward and backward over every position.
Prints medians, and for each the ratio to ours taken pair by pair, the arena, and with --trace our time by operator.

ours         ExecuTorch, experts and dense matrices in 4 bits
grouped_mm   transformers + PEFT target_parameters, fp32 weights, the fastest of transformers' expert implementations
eager        the same with transformers' loop over experts
hand-written transformers' attention, tokens routed by hand, LoRA on each expert's tokens, fp32 weights
floor        only the products of the routed tokens with frozen experts, forward and backward, by torch.mm
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from executorch.devtools import Inspector
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from edge import native
from export import families, outline
from export.to_executorch import lower
from export.train_graph import SubModel, capture
from protocol import lora
from protocol.manifest import Shape, Slot, TensorSpec

Step = Callable[[], Any]


def config_of(args: argparse.Namespace) -> OlmoeConfig:
    """The benchmark's OLMoE."""
    return OlmoeConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
        max_position_embeddings=2 * args.sequence,
    )


def value_of(spec: TensorSpec, vocabulary: int) -> np.ndarray[Any, Any]:
    """Random values of a sensible size for one input."""
    rng = np.random.default_rng(zlib.crc32(spec.name.encode()))  # the same in every process
    if spec.name in ("tokens", "targets"):
        return rng.integers(0, vocabulary, spec.shape)
    if spec.name == "positions":
        return np.arange(spec.shape[0] * spec.shape[1]).reshape(spec.shape)
    if spec.name in ("valid", "weights") or "norm" in spec.name or "output_scale" in spec.name:
        return np.ones(spec.shape, np.float32)
    if spec.name.startswith("objective."):  # plain: no term, no cap, all experts of a token
        every = spec.name in ("objective.cap", "objective.active")
        return np.full(spec.shape, 1 << 20 if every else 0, np.float32)
    if spec.name.endswith(".target"):
        return np.full(spec.shape, 1 / spec.shape[0], np.float32)
    if spec.dtype == "uint8":
        return rng.integers(1, 256, spec.shape, dtype=np.uint8)
    if spec.name.endswith(".scale"):
        return rng.uniform(0.001, 0.01, spec.shape).astype(np.float16)
    return rng.normal(0, 0.05, spec.shape).astype(np.float32)


def ours(args: argparse.Namespace, folder: Path) -> tuple[Step, native.Program, Path]:
    """Our program, ready to step."""
    base = outline.of(config_of(args).to_dict())
    slots = ((Slot(format="int4", rank=args.rank),) * args.experts,) * args.layers
    shape = Shape(
        batch=1, sequence=args.sequence, answers=args.sequence - 1, dense="int4", slots=slots
    )
    model = SubModel(base, families.of(base.config, "benchmark"), shape, evaluate=False)
    path = folder / "step.pte"
    path.write_bytes(lower(capture(model)).program)
    inputs = [value_of(spec, base.vocabulary) for spec in model.specs]
    program = native.Program(path, trace=args.trace)
    native.set_threads(1)
    return lambda: program.run("forward", inputs), program, path


class HandWritten(nn.Module):
    """What a careful engineer writes in place of transformers' sparse block."""

    def __init__(self, config: OlmoeConfig, rank: int) -> None:
        super().__init__()
        d, f, e = config.hidden_size, config.intermediate_size, config.num_experts
        self.top_k = config.num_experts_per_tok
        self.up = nn.Parameter(torch.randn(e, 2 * f, d) * 0.02, requires_grad=False)
        self.down = nn.Parameter(torch.randn(e, d, f) * 0.02, requires_grad=False)
        self.gate = nn.Parameter(torch.randn(e, d) * 0.02)
        sizes = ((rank, d), (2 * f, rank), (rank, f), (d, rank))
        self.factors = nn.ParameterList(torch.randn(e, *size) * 0.02 for size in sizes)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, d] -> the same shape."""
        x = hidden.reshape(-1, hidden.shape[-1])
        weight, slot = torch.topk(F.softmax(x @ self.gate.t(), -1), self.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        up_a, up_b, down_a, down_b = self.factors
        out = torch.zeros_like(x)
        for e in range(len(self.up)):
            token, place = torch.where(slot == e)
            h = x[token]
            h = F.linear(h, self.up[e]) + F.linear(F.linear(h, up_a[e]), up_b[e]) * lora.SCALE
            gate, other = h.chunk(2, -1)
            h = F.silu(gate) * other
            h = F.linear(h, self.down[e]) + F.linear(F.linear(h, down_a[e]), down_b[e]) * lora.SCALE
            out = out.index_add(0, token, h * weight[token, place, None])
        return out.view(hidden.shape)


def stepper(model: nn.Module, tokens: Tensor) -> Step:
    """Forward, loss over every position, backward."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(tokens, use_cache=False).logits[0, :-1]
        F.cross_entropy(logits, tokens[0, 1:]).backward()

    return step


def with_peft(args: argparse.Namespace, implementation: str, tokens: Tensor) -> Step:
    """Transformers and stock PEFT, one of transformers' expert implementations."""
    config = config_of(args)
    config._experts_implementation = implementation
    model = OlmoeForCausalLM(config)
    wanted = LoraConfig(
        r=args.rank,
        lora_alpha=lora.alpha(args.rank),
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        modules_to_save=["gate"],
    )
    return stepper(get_peft_model(model, wanted), tokens)


def hand_written(args: argparse.Namespace, tokens: Tensor) -> Step:
    """Transformers' attention around `HandWritten` blocks."""
    model = OlmoeForCausalLM(config_of(args)).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp = HandWritten(model.config, args.rank)
    return stepper(model, tokens)


def floor(args: argparse.Namespace) -> tuple[Step, float]:
    """The products of balanced routing through frozen experts, and their floating-point operations."""
    d, f, rows = args.hidden, args.width, args.sequence * args.top_k // args.experts
    up, down = torch.randn(2 * f, d), torch.randn(d, f)
    x, h, dy, dh = (torch.randn(rows, n) for n in (d, f, d, 2 * f))

    def step() -> None:
        for _ in range(args.layers * args.experts):
            x @ up.t(), h @ down.t(), dy @ down, dh @ up

    return step, 12.0 * d * f * rows * args.experts * args.layers


def by_operator(program: native.Program, folder: Path, steps: int) -> None:
    """Milliseconds per step by operator, from the runtime's own trace (which slows it a little)."""
    program.write_trace(folder / "trace")
    spent: dict[str, float] = defaultdict(float)
    for block in Inspector(etdump_path=str(folder / "trace")).event_blocks:
        for event in block.events:
            if event.name and event.perf_data and event.name.startswith("native_call_"):
                spent[event.name.removeprefix("native_call_")] += sum(event.perf_data.raw)
    whole = sum(spent.values())
    for name, value in sorted(spent.items(), key=lambda item: -item[1])[:14]:
        print(f"  {name:44s} {value / steps:8.2f} ms  {100 * value / whole:4.1f} %")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {
        **{"hidden": 512, "width": 1024, "layers": 4, "experts": 8, "top-k": 2},
        **{"sequence": 128, "rank": 8, "vocabulary": 1024, "runs": 9},
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--trace", action="store_true", help="our time by operator")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = torch.randint(0, args.vocabulary, (1, args.sequence))
    with tempfile.TemporaryDirectory() as folder:
        ours_step, program, path = ours(args, Path(folder))
        floor_step, operations = floor(args)
        steps = {
            "ours": ours_step,
            "grouped_mm": with_peft(args, "grouped_mm", tokens),
            "eager": with_peft(args, "eager", tokens),
            "hand-written": hand_written(args, tokens),
            "floor": floor_step,
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for run in range(args.runs + 2):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if run > 1:  # the first two warm up
                    seconds[name].append(time.perf_counter() - start)
        for name, values in seconds.items():
            ratios = sorted(o / v for o, v in zip(seconds["ours"], values, strict=True))
            print(
                f"{name:12s} median {statistics.median(values):.4f} s of {args.runs}; ours / it "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        rate = operations / statistics.median(seconds["floor"]) / 1e9
        print(f"routed tokens: {operations / 1e9:.2f} GFLOP, {rate:.0f} GFLOP/s by torch.mm")
        print(
            f"arena {program.arena_bytes('forward') / 1e6:.1f} MB, program {path.stat().st_size / 1e6:.2f} MB"
        )
        if args.trace:
            by_operator(program, Path(folder), args.runs + 2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Every family: how exact its programs are, and what its public model costs a device.

    python -m benchmarks.families [--only NAME ...] [--skip-parity]

Prints a Markdown table. Parity is measured on the tiny random checkpoints of the tests, with four experts of a layer
resident in mixed formats and ranks: the largest difference of a logit between the ExecuTorch program and transformers
with the other experts masked, and the largest difference of a gradient from autograd's, as a share of the largest
gradient. The rest is the planner's, from `configs/` alone, without weights: megabytes of an artifact on flash, the
predicted peak of memory against the budget, and the experts resident of all. Routing is taken to be uniform.
`configs/` has the sizes of the public models; position scaling, which changes no size, is not always given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import device_profiles
from edge.session import Artifact, Batch, Resident, load_backend
from export import costs, families, outline, plan
from export.families import fft_moe
from export.programs import lower_programs
from tests.export.families import (
    compare,
    lowered,
    setting,
    test_fft_moe,
    test_switch,
    tiny_fft,
    tiny_switch,
)

CONFIGS = Path(__file__).parent / "configs"
MODELS = {
    "olmoe_1b_7b": "OLMoE-1B-7B",
    "mixtral_8x7b": "Mixtral-8x7B",
    "qwen1_5_moe_a2_7b": "Qwen1.5-MoE-A2.7B",
    "qwen3_30b_a3b": "Qwen3-30B-A3B",
    "granite_3_0_3b_a800m": "Granite-3.0-3B-A800M",
    "deepseek_v2_lite": "DeepSeek-V2-Lite",
    "moonlight_16b_a3b": "Moonlight-16B-A3B",
    "phi_3_5_moe": "Phi-3.5-MoE",
    "switch_base_8": "Switch-base-8",
    "switch_base_32": "Switch-base-32",
    "qwen3_0_6b": "Qwen3-0.6B + 8 adapter experts",
    "llama_3_2_1b": "Llama-3.2-1B + 8 adapter experts",
}
ADAPTER_EXPERTS = {fft_moe.EXPERTS: 8, fft_moe.TOP_K: 2}
PROFILES = ("pixel_8", "jetson_orin_nano", "jetson_orin")

Arrays = dict[str, NDArray[Any]]
Answer = tuple[NDArray[Any], Arrays]  # logits, gradients by global name


def _runtime(artifact: Artifact, resident: Resident, adapter: Arrays, batch: Batch) -> Answer:
    backend = load_backend("executorch")
    session = backend.open_train(artifact, resident)
    session.load(adapter)
    session.forward_backward(batch)
    gradients = {name: value.copy() for name, value in session.gradients().items()}
    session.close()
    reader = backend.open_evaluate(artifact, resident)
    logits, _ = reader.evaluate(batch, adapter)
    reader.close()
    return logits, gradients


def _causal(model_type: str, root: Path) -> tuple[Answer, Answer]:
    base, store = setting.sliced(model_type, root)
    family, shape = families.of(base.config, model_type), setting.shape_of(base, setting.SLOTS)
    programs = lower_programs(base, family, shape, store, lambda stage: None)
    artifact = setting.artifact(base, store, setting.SLOTS, programs.train, programs.evaluate)
    resident, adapter = setting.resident_of(base), setting.adapter(base, setting.SLOTS, 0.1)
    wanted = compare.transformers_logits(base, resident, setting.SLOTS, adapter)
    _, gradients, _ = compare.gradients("torch", artifact, resident, adapter)
    batch = setting.batch(base.vocabulary)
    return (wanted, gradients), _runtime(artifact, resident, adapter, batch)


def _switch(model_type: str, root: Path) -> tuple[Answer, Answer]:
    checkpoint = tiny_switch.write_switch(root / "checkpoint")
    base, family, store = lowered.sliced(checkpoint, root)
    shape, resident, batch = test_switch.SHAPE, test_switch.RESIDENT, test_switch.BATCH
    adapter = test_switch.adapter_of(base)
    wanted = test_switch.reference(checkpoint, resident, shape, adapter, batch)
    artifact = lowered.artifact(base, family, store, shape)
    return (wanted[0], wanted[2]), _runtime(artifact, resident, adapter, batch)


def _adapters(model_type: str, root: Path) -> tuple[Answer, Answer]:
    checkpoint = tiny_fft.write_dense(root / "checkpoint", model_type)
    base, family, store = lowered.sliced(checkpoint, root, ("int8",), test_fft_moe.ASKED)
    shape, resident, batch = test_fft_moe.SHAPE, test_fft_moe.RESIDENT, test_fft_moe.BATCH
    adapter = test_fft_moe.adapter_of(resident, shape.slots)
    wanted = test_fft_moe.reference(checkpoint, base, resident, adapter, batch)
    artifact = lowered.artifact(base, family, store, shape)
    return (wanted[0], wanted[2]), _runtime(artifact, resident, adapter, batch)


TINY: dict[str, Callable[[str, Path], tuple[Answer, Answer]]] = {
    "switch_transformers": _switch,
    **dict.fromkeys(fft_moe.DENSE, _adapters),
}


def parity(model_type: str) -> tuple[float, float]:
    """(largest difference of a logit, of a gradient as a share of the largest) on the tiny checkpoint."""
    with tempfile.TemporaryDirectory() as root:
        (wanted, gradients), (logits, found) = TINY.get(model_type, _causal)(model_type, Path(root))
    largest = max(float(np.abs(value).max()) for value in gradients.values())
    return float(np.abs(logits - wanted).max()), compare.largest(found, gradients) / largest


def cells(config: dict[str, Any]) -> list[str]:
    """What the planner says for each profile."""
    base = outline.of(families.complete(config, "config"))
    dense, everyone = costs.dense_of(base), base.num_experts * len(base.moe_layers)
    found = []
    for name in PROFILES:
        try:
            chosen = plan.choose(base, dense, device_profiles.load(name), plan.Choices())
        except plan.DoesNotFit:
            found.append("does not fit")
            continue
        experts = sum(len(ids) for ids in chosen.experts)
        found.append(
            f"{sum(chosen.flash.values()) / 1e6:,.0f} MB, "
            f"{chosen.memory.predicted >> 20:,} of {chosen.budget.memory >> 20:,} MiB, "
            f"{experts} of {everyone}"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--skip-parity", action="store_true")
    args = parser.parse_args(argv)
    head = ["model_type", "tiny: logits", "gradients", "public model", *PROFILES]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for name in args.only:
        config = json.loads((CONFIGS / f"{name}.json").read_text())
        model_type = config["model_type"]
        if model_type in fft_moe.DENSE:
            config |= ADAPTER_EXPERTS
        exact = ["", ""] if args.skip_parity else [f"{value:.0e}" for value in parity(model_type)]
        print("| " + " | ".join([model_type, *exact, MODELS[name], *cells(config)]) + " |")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

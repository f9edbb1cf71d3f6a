"""The ceiling: LoRA on the whole reference base in one place, with all devices' rows and as many samples as they used.

    python -m lab.central --base DIR --train DIR --rows test.jsonl --task task.json --sequence 32 --samples 6912

What federation gives away to skew, to small devices, to low ranks and to few bits is the distance to this. PEFT on
every expert and the routers, at the run's rank, float32, AdamW, a linearly falling learning rate.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge import data
from edge.data import Prompter
from lab import dataset
from lab.evaluate import (
    answer_logits,
    answer_loss,
    load_base,
    prompter_of,
    score,
    shared_flags,
    test_rows,
)
from protocol import lora

log = logging.getLogger(__name__)


def adapted(
    base: Path, rank: int, parameters: Sequence[str], modules: Sequence[str], routers: Sequence[str]
) -> Any:
    """The base with fresh LoRA on its experts (`parameters` or `modules`) and trainable modules `routers`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=lora.alpha(rank),
        target_modules=list(modules),
        target_parameters=list(parameters),
        modules_to_save=list(routers),
    )
    return get_peft_model(load_base(base), config)


def train(
    model: Any,
    prompts: Prompter,
    rows: Sequence[data.Row],
    samples: int,
    learning_rate: float,
    router_learning_rate: float,
    seed: int,
) -> None:
    """Train in place on `samples` rows, drawn in passes over `rows`."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["lora_" in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "lr": learning_rate},
            {"params": groups[False], "lr": router_learning_rate},
        ],
        weight_decay=0.0,
    )
    steps = max(1, round(samples / prompts.batch))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    trained = [p for group in groups.values() for p in group]
    model.train()
    rng = np.random.default_rng(seed)
    for step, batch in enumerate(data.training_batches(prompts, rows, steps, rng), 1):
        loss = answer_loss(answer_logits(model, batch), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps:
            log.info("step=%d of %d loss=%.4f", step, steps, float(loss.detach()))
    model.eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shared_flags(parser)
    parser.add_argument("--train", type=Path, required=True, help="folder of the devices' rows")
    parser.add_argument("--samples", type=int, required=True, help="rows trained on, with repeats")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--router-learning-rate", type=float, default=0.003)
    parser.add_argument("--target-parameters", nargs="*", default=[])
    parser.add_argument("--target-modules", nargs="*", default=[])
    parser.add_argument("--modules-to-save", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    prompts = prompter_of(args.task, args.base, args.batch, args.sequence, args.answers)
    rows = [
        data.Row(row.text, row.label)
        for path in sorted(args.train.glob("*.jsonl"))
        for row in dataset.load(path)
    ]
    # The devices hold one row in five back; so does the ceiling.
    rows, _ = data.split_rows(rows)
    model = adapted(
        args.base, args.rank, args.target_parameters, args.target_modules, args.modules_to_save
    )
    train(
        model,
        prompts,
        rows,
        args.samples,
        args.learning_rate,
        args.router_learning_rate,
        args.seed,
    )
    print(json.dumps(asdict(score(model, prompts, test_rows(args.rows), "central"))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

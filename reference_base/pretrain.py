"""Pretrain the reference base on CPU: python -m reference_base.pretrain --data DIR --minutes 120 --out DIR.

A stock `OlmoeForCausalLM`, trained on public-domain and CC BY-SA text only (see `corpus.py`). Every sequence holds one
domain, so that the router has something to tell apart. Muon for the matrices, AdamW for the rest; the learning rate
follows the clock, because the time is what is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from reference_base.balance import balance, information
from reference_base.corpus import END, PAD, documents, encode, train_tokenizer

log = logging.getLogger(__name__)
VOCABULARY, SEQUENCE = 4096, 256
BALANCE, INFORMATION = 0.01, 0.02  # weights of the router's auxiliary losses
# How often a sequence of each domain is drawn. Verse is small and would be over-trained at a quarter.
MIX = {"fiction": 0.33, "verse": 0.07, "instructions": 0.28, "encyclopedia": 0.32}


def config() -> OlmoeConfig:
    """7.3 M parameters, of which a token uses 2.1 M; every dimension a multiple of the int4 group of 32."""
    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.0,
        output_router_logits=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


class Muon(torch.optim.Optimizer):
    """Momentum with the update orthogonalised (Jordan 2024); takes stacked matrices, which torch's own does not."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @staticmethod
    def orthogonalise(update: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz steps towards the nearest orthogonal matrix; [..., rows, columns]."""
        x = update.bfloat16()
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return (x.mT if tall else x).float()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                if p.dim() == 3 and p.shape[1] == 2 * config().intermediate_size:
                    # gate and up are two matrices in one parameter
                    update = torch.cat([self.orthogonalise(u) for u in update.chunk(2, 1)], 1)
                else:
                    update = self.orthogonalise(update)
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                p.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * scale)


def batch(
    streams: dict[str, NDArray[np.uint16]],
    size: int,
    rng: np.random.Generator,
    mix: Mapping[str, float] = MIX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [size, SEQUENCE + 1], each row from one domain, and the rows' domains [size]."""
    rows, names = [], list(mix)
    domains = rng.choice(len(names), size, p=list(mix.values()))
    for domain in domains:
        stream = streams[names[domain]]
        start = rng.integers(0, len(stream) - SEQUENCE - 1)
        rows.append(stream[start : start + SEQUENCE + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(domains)


@torch.no_grad()
def held_out_loss(model: OlmoeForCausalLM, stream: NDArray[np.uint16], rows: int = 24) -> float:
    """Mean cross-entropy in nats per token over the first `rows` windows."""
    count = min(rows, (len(stream) - 1) // SEQUENCE)
    ids = np.stack([stream[i * SEQUENCE : (i + 1) * SEQUENCE] for i in range(count)])
    ids = torch.from_numpy(ids.astype(np.int64))
    return float(model(input_ids=ids, labels=ids).loss)


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The saved file holds each expert's matrices by themselves; the model stacks them."""
    fused = {k: v for k, v in weights.items() if ".experts." not in k}
    for layer in range(config().num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        each = [
            {n: weights[f"{prefix}.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")}
            for e in range(config().num_experts)
        ]
        fused[f"{prefix}.gate_up_proj"] = torch.stack(
            [torch.cat([w["gate"], w["up"]]) for w in each]
        )
        fused[f"{prefix}.down_proj"] = torch.stack([w["down"] for w in each])
    return fused


def save(model: OlmoeForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write fp16 safetensors and the tokenizer in ordinary Hugging Face form."""
    state = {k: v.to(torch.float16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    half = OlmoeForCausalLM(model.config).half()
    half.load_state_dict(state, strict=False)
    half.tie_weights()
    half.save_pretrained(out)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.save_pretrained(out)


def pretrain(
    data: Path,
    out: Path,
    minutes: float,
    rows: int,
    seed: int,
    resume: Path | None,
    read: Callable[[Path], tuple[dict[str, list[str]], dict[str, list[str]]]] = documents,
    mix: Mapping[str, float] = MIX,
) -> None:
    """Train for `minutes` of wall-clock time; write the model and `training_log.jsonl` to `out`.

    `resume` goes on from a saved model and its tokenizer; the optimizers start afresh. `read` gives seen and held-out
    documents by domain, `mix` the share of each.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    seen, held = read(data)
    if resume:
        tokenizer = Tokenizer.from_file(str(resume / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer((t for texts in seen.values() for t in texts), VOCABULARY)
    streams = {d: encode(tokenizer, texts) for d, texts in seen.items()}
    unseen = {d: encode(tokenizer, texts) for d, texts in held.items()}
    log.info("tokens %s", {d: len(s) for d, s in streams.items()})
    # The grouped_mm experts are the fastest of the library's on CPU.
    model = OlmoeForCausalLM._from_config(
        config(), attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    if resume:
        weights = load_file(resume / "model.safetensors")
        model.load_state_dict(_fused({k: v.float() for k, v in weights.items()}), strict=False)
    model.config.output_router_logits = True
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.dim() >= 2 and "embed" not in n and "mlp.gate" not in n
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [0.02, 3e-3]
    out.mkdir(parents=True, exist_ok=True)
    start = last_save = time.monotonic()
    step = tokens = 0
    running = 0.0
    with open(out / "training_log.jsonl", "w", encoding="utf-8") as record:
        while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
            factor = min(1.0, (step + 1) / 100) * min(1.0, (1 - done) / 0.6)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * factor
            ids, domains = batch(streams, rows, rng, mix)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                result = model(input_ids=ids, labels=ids)
            loss = result.loss
            routers, per_token = result.router_logits, domains.repeat_interleave(ids.shape[1])
            even = balance(routers, config().num_experts_per_tok)
            (loss + BALANCE * even - INFORMATION * information(routers, per_token)).backward()
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step, tokens = step + 1, tokens + ids.numel()
            running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
            if step % 50 == 0:
                entry: dict[str, object] = {
                    "step": step,
                    "tokens": tokens,
                    "seconds": round(time.monotonic() - start),
                    "loss": round(running, 4),
                    "balance": round(float(even), 3),
                    "lr_factor": round(factor, 4),
                }
                if step % 500 == 0:
                    model.eval()
                    model.config.output_router_logits = False
                    entry["held_out"] = {
                        d: round(held_out_loss(model, s), 4) for d, s in unseen.items()
                    }
                    model.config.output_router_logits = True
                    model.train()
                record.write(json.dumps(entry) + "\n")
                record.flush()
                log.info("%s", entry)
            if time.monotonic() - last_save > 300:
                model.config.output_router_logits = False
                save(model, tokenizer, out)
                model.config.output_router_logits = True
                last_save = time.monotonic()
    model.config.output_router_logits = False
    save(model, tokenizer, out)
    log.info("saved %s after %d steps, %d tokens", out, step, tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the clean data sets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--rows", type=int, default=24, help=f"sequences of {SEQUENCE} per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="go on from this model directory")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    pretrain(args.data, args.out, args.minutes, args.rows, args.seed, args.resume)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What each storage format costs in quality: python -m benchmarks.formats --data ../shared/data.

Held-out text of the reference base (see reference_base.evaluate) is scored with the experts, the dense matrices, or
both replaced by what a device reads back. Prints a Markdown table; its columns of texts are bits per byte.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import OlmoeForCausalLM

from protocol import packing
from reference_base import MODEL_DIR
from reference_base.corpus import DOMAINS, END, documents, encode
from reference_base.evaluate import UNSEEN, Meter, news

PARTS = {"experts": (True, False), "dense": (False, True), "both": (True, True)}
Texts = dict[str, tuple[NDArray[np.uint16], int]]


def texts(data: Path, tokenizer: Tokenizer, limit: int) -> Texts:
    """name -> tokens, at most `limit`, and the bytes they stand for."""
    _, held = documents(data)
    rows = {**{domain: held[domain] for domain in DOMAINS}, UNSEEN: news(data)}
    end = np.array([tokenizer.token_to_id(END)], dtype=np.uint16)
    found: Texts = {}
    for name, documents_ in rows.items():
        tokens = encode(tokenizer, documents_)[:limit]
        size = len(tokenizer.decode(tokens.tolist()).encode())
        found[name] = np.concatenate([end, tokens]), size
    return found


def load(format: str, experts: bool, dense: bool) -> tuple[OlmoeForCausalLM, float]:
    """The reference base as a device with weights of this format computes it; relative rms error of what is packed."""
    model = OlmoeForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    squared, total = 0.0, 0.0
    for name, value in model.named_parameters():
        expert = "experts" in name
        if "gate.weight" in name or not (experts if expert else dense):
            continue
        if not expert and not packing.packs(tuple(value.shape)):
            continue
        weight = value.detach().numpy().reshape(-1, value.shape[-1])
        back = packing.dequantize(*packing.quantize(weight, format), format)
        squared += float(((back - weight) ** 2).sum())
        total += float((weight**2).sum())
        value.data = torch.from_numpy(back).reshape(value.shape)
    return model, math.sqrt(squared / total) if total else 0.0


def bits(model: OlmoeForCausalLM, held: Texts) -> dict[str, float]:
    """name -> bits per byte; `tokens` -> perplexity per token over everything."""
    meter, found, nats, count = Meter(model), {}, 0.0, 0
    for name, (stream, size) in held.items():
        nll, _, _ = meter.run(stream)
        found[name] = float(nll.sum()) / math.log(2) / size
        nats, count = nats + float(nll.sum()), count + len(nll)
    return {**found, "perplexity": math.exp(nats / count)}


def expert_bytes(format: str, hidden: int, intermediate: int) -> int:
    """Packed bytes and scales of one gated expert."""
    weights = 3 * hidden * intermediate
    return weights * packing.BITS[format] // 8 + weights // packing.GROUP * 2


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--limit", type=int, default=1 << 30, help="tokens of each text")
    parser.add_argument("--formats", nargs="+", default=list(packing.FORMATS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    args = parser.parse_args(argv)
    if not (args.data / "gutenberg").is_dir():
        print(f"skipped: {args.data} holds no data sets", file=sys.stderr)
        return 0
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    held = texts(args.data, tokenizer, args.limit)
    rows = [("float32", "")] + [(f, p) for p in args.parts for f in args.formats]
    heads = ("format", "of", "bytes per expert", "error", "perplexity", *held)
    print("|", " | ".join(heads), "|")
    print("|---" * len(heads) + "|", flush=True)
    for format, part in rows:
        if part:
            model, error = load(format, *PARTS[part])
            size = expert_bytes(format, model.config.hidden_size, model.config.intermediate_size)
        else:
            model, error = load("int8", False, False)
            size = 12 * model.config.hidden_size * model.config.intermediate_size
        found = bits(model, held)
        perplexity = found.pop("perplexity")
        print(
            f"| {format} | {part} | {size} | {error:.4f} | {perplexity:.3f} |",
            " | ".join(f"{value:.4f}" for value in found.values()),
            "|",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

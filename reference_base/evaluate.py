"""Measure the reference base: python -m reference_base.evaluate --data DIR.

Bits per byte on held-out text of each domain and on AG News (never trained on), against a unigram and a trigram over
the same tokens of the same training text; how the routing differs between domains. Writes `evaluation.json`,
`routing_prior.json`, `routing.png` and the model card `README.md` beside the model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import OlmoeForCausalLM

from reference_base import MODEL_DIR, ngram, plot, routing
from reference_base.card import card
from reference_base.corpus import DOMAINS, END, documents, encode

log = logging.getLogger(__name__)
UNSEEN = "news"
WINDOW, STRIDE, ROWS = 256, 128, 16
NEWS_ROWS = 1500
IDLE = 0.005  # an expert with less of the router's probability has as good as no tokens


class EvaluationError(ValueError):
    """Data or a model that cannot be evaluated. One line."""


def windows(count: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut `count` predictions into windows of at most `size`, each scoring what no earlier one has.

    Yields
    ------
    start, stop, first : the window and the first prediction in it that counts

    Examples
    --------
    >>> list(windows(7, 4, 2))
    [(0, 4, 0), (2, 6, 4), (4, 7, 6)]
    """
    scored = 0
    while scored < count:
        start = 0 if scored == 0 else scored - (size - stride)
        stop = min(start + size, count)
        yield start, stop, scored
        scored = stop


def news(data: Path) -> list[str]:
    """Evenly spaced rows of AG News' training file; its licence allows research only, so nothing is trained on it."""
    with gzip.open(data / "agnews/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return texts[:: max(1, len(texts) // NEWS_ROWS)][:NEWS_ROWS]


class Meter:
    """Runs the model over a stream; keeps the loss of every token and the router's probabilities by halves."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.model = model
        self.logits: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda _m, _i, out: self.logits.append(out[0]))

    @torch.no_grad()
    def run(self, stream: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Score `stream[1:]` [N].

        Returns
        -------
        nll : float64 [N], nats
        mass : float64 [2, L, E], mean router probability over the stream's first and second half
        top : float64 [2, L, E], share of the routed tokens
        """
        config = self.model.config
        count = len(stream) - 1
        nll = np.zeros(count)
        shape = (2, config.num_hidden_layers, config.num_experts)
        mass, top, tokens = np.zeros(shape), np.zeros(shape), np.zeros(2)
        plan = list(windows(count, WINDOW, STRIDE))
        for group in range(0, len(plan), ROWS):
            part = plan[group : group + ROWS]
            ids = np.zeros((len(part), WINDOW + 1), dtype=np.int64)
            counted = np.zeros((len(part), WINDOW), dtype=bool)
            for row, (start, stop, first) in enumerate(part):
                ids[row, : stop - start + 1] = stream[start : stop + 1]
                counted[row, first - start : stop - start] = True
            self.logits.clear()
            tensor = torch.from_numpy(ids)
            logits = self.model(input_ids=tensor[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tensor[:, 1:].flatten(), reduction="none"
            )
            losses = loss.view(len(part), WINDOW).numpy()
            for row, (start, stop, first) in enumerate(part):
                nll[first:stop] = losses[row, first - start : stop - start]
            half = int(part[0][0] >= count // 2)
            tokens[half] += counted.sum()
            for layer, router in enumerate(self.logits):
                g = router.float().softmax(-1)[torch.from_numpy(counted.reshape(-1))]
                chosen = g.topk(config.num_experts_per_tok, dim=-1).indices
                mass[half, layer] += g.double().sum(0).numpy()
                top[half, layer] += np.bincount(
                    chosen.flatten().numpy(), minlength=config.num_experts
                )
        per = np.maximum(tokens, 1)[:, None, None]
        return nll, mass / per, top / per / config.num_experts_per_tok


def measure(model: OlmoeForCausalLM, tokenizer: Tokenizer, data: Path) -> dict[str, Any]:
    """Everything that `evaluation.json` holds."""
    seen, held = documents(data)
    texts = {**{domain: held[domain] for domain in DOMAINS}, UNSEEN: news(data)}
    vocabulary = model.config.vocab_size
    trained_on = encode(tokenizer, [text for domain in DOMAINS for text in seen[domain]])
    log.info("n-grams over %d tokens", len(trained_on))
    unigram = ngram.unigram(trained_on, vocabulary)
    trigram = ngram.Trigram.fit(trained_on, vocabulary)
    meter, end = Meter(model), tokenizer.token_to_id(END)
    per_text: dict[str, Any] = {}
    masses, tops = {}, {}
    for name, rows in texts.items():
        # Two end tokens in front, so that all models score the same tokens, from the first one on.
        stream = np.concatenate([np.array([end, end], dtype=np.uint16), encode(tokenizer, rows)])
        nll, masses[name], tops[name] = meter.run(stream[1:])
        size = sum(len(row.encode()) for row in rows)
        bits = {
            "model": nll.sum(),
            "trigram": -trigram.log_probabilities(stream).sum(),
            "unigram": -unigram[stream[2:]].sum(),
        }
        per_text[name] = {
            "bytes": size,
            "tokens": len(nll),
            "loss_per_token": round(float(nll.mean()), 4),
            "bits_per_byte": {k: round(float(v) / math.log(2) / size, 4) for k, v in bits.items()},
        }
        log.info("%s %s", name, per_text[name])
    profiles = np.stack([masses[name].mean(0) for name in texts])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "texts": per_text,
        "training_tokens": len(trained_on),
        "routing": {
            "domains": list(texts),
            "mass": profiles.round(5).tolist(),
            "top": np.stack([tops[name].mean(0) for name in texts]).round(5).tolist(),
            "cosine_of_mass": _table(masses),
            "cosine_of_top": _table(tops),
            "idle_experts": (routing.prior(profiles[: len(DOMAINS)]) < IDLE).sum(-1).tolist(),
            "information_bits": routing.information(profiles[: len(DOMAINS)]).round(4).tolist(),
        },
    }


def _table(halves: dict[str, NDArray[Any]]) -> list[list[list[float]]]:
    """Cosines [D, D, L] between domains; on the diagonal between the two halves of one domain."""
    names = list(halves)
    return [
        [
            routing.cosines(
                halves[a][0] if a == b else halves[a].mean(0),
                halves[b][1] if a == b else halves[b].mean(0),
            )
            .round(4)
            .tolist()
            for b in names
        ]
        for a in names
    ]


def _write(path: Path, content: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(content, encoding="utf-8")
    os.replace(part, path)


def evaluate(data: Path, directory: Path) -> dict[str, Any]:
    """Measure the model in `directory` and write the four files beside it."""
    for path in (directory / n for n in ("config.json", "tokenizer.json", "training_log.jsonl")):
        if not path.is_file():
            raise EvaluationError(
                f"{path}: no such file; the model comes from reference_base.pretrain"
            )
    for path in (data / "gutenberg", data / "agnews"):
        if not path.is_dir():
            raise EvaluationError(f"{path}: no such folder; --data wants the folder of data sets")
    # The checkpoint is float16; the processor computes in float32.
    model = OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    result = measure(model, tokenizer, data)
    mass = np.array(result["routing"]["mass"])
    prior = routing.prior(mass[: len(DOMAINS)])
    _write(directory / "evaluation.json", json.dumps(result, indent=1) + "\n")
    _write(directory / "routing_prior.json", json.dumps({"layers": prior.tolist()}) + "\n")
    plot.heat_maps(mass, result["routing"]["domains"], directory / "routing.png")
    lines = (directory / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    training = [json.loads(line) for line in lines]
    _write(
        directory / "README.md",
        card(result, training, model.config.to_dict(), WINDOW, WINDOW - STRIDE),
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python -m reference_base.evaluate --data ../data",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        result = evaluate(args.data, args.model)
    except (EvaluationError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    for name, text in result["texts"].items():
        print(name, *(f"{k} {v:.3f}" for k, v in text["bits_per_byte"].items()), "bits per byte")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The model card, written from the measurements so that no figure in it is typed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference_base.pretrain import MIX, SEQUENCE

TEMPLATE = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [olmoe, mixture-of-experts]
---

# Expertfleet reference base

A small Mixture-of-Experts language model that ships with Expertfleet, so that the whole loop of
federated fine-tuning runs on any machine without a download. It is a stock `OlmoeForCausalLM`:
{layers} layers of {experts} experts, top-{k}, width {d}, expert width {f}, a byte-level BPE vocabulary
of {v}, tied embeddings, {total:.1f} M parameters of which a token uses {active:.1f} M, float16.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("reference_base/model")
tokenizer = AutoTokenizer.from_pretrained("reference_base/model")
```

## Data

| domain | text | licence |
|---|---|---|
| fiction, verse | 20 books of Project Gutenberg | public domain in the USA |
| instructions | databricks-dolly-15k | CC BY-SA 3.0 |
| encyclopedia | a subset of SQuAD 1.1: paragraphs of Wikipedia with questions | CC BY-SA 4.0 |
| encyclopedia | WikiText-2, validation part | CC BY-SA 3.0 |

{seen:.1f} M tokens in all. The last 2% of every book, every 50th row of dolly, 150 held-out paragraphs
of SQuAD and the last 10% of the WikiText part are kept out of training and measured below. AG News is
measured only. `reference_base/corpus.py` holds the split.

## Training

`python -m reference_base.pretrain`: {steps} steps of {rows} sequences of {sequence} tokens
({tokens:.1f} M tokens) in {minutes:.0f} minutes on a CPU, bfloat16 autocast. Each sequence comes from one
domain: {mix}. Muon trains the matrices, AdamW the rest; the script holds the schedule. It was
stopped and resumed twice, with fresh optimizers. Up to step 2000 the library's own load-balancing
loss was used, which pools the layers and had left 15 of 64 experts idle; after that the one of
`balance.py`. Running mean of the training loss at the end: {loss:.2f} per token. Every
50th step is in [training_log.jsonl](training_log.jsonl).

## Results

Bits per byte, lower is better. Windows of {window} tokens; every token but those of a text's first
window has at least {context} tokens before it. End-of-document tokens are counted. The trigram is
interpolated Kneser-Ney; all three models saw the same tokens of the same training text.

{results}

Routing by domain: mean router probability in percent.

![Mean router probability per layer, domain and expert](routing.png)

Cosine between the domains' mean router probabilities, averaged over the layers. On the diagonal: the
two halves of one domain, which is what chance alone leaves.

{mass}

The same for the share of tokens that each expert gets (top-{k}):

{top}

Bits that one routed expert tells about which of the four training domains a text is from (at most 2),
by layer: {bits}. Experts with less than 0.5% of the router's probability, by layer: {idle}.

`python -m reference_base.evaluate` measured this and wrote this card. The figures are in
[evaluation.json](evaluation.json), the mean routing over the four training domains in
[routing_prior.json](routing_prior.json).

## Intended use and limits

For demonstrations, tests and experiments with expert selection and federated fine-tuning. It is far too
small to be an assistant or a source of facts: it writes plausible fragments that are often wrong. English
only. Its books are old and its other text comes from the web; it repeats their views and errors. It has
had no safety training. The weights are under Apache-2.0; the texts keep the licences above.
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def _results(texts: dict[str, Any]) -> str:
    rows = []
    for name, text in texts.items():
        label = "AG News (domain not trained on)" if name == "news" else f"{name} (held out)"
        bits = [f"{text['bits_per_byte'][m]:.3f}" for m in ("unigram", "trigram", "model")]
        rows.append([label, str(text["bytes"]), *bits])
    return _table(["text", "bytes", "unigram", "trigram", "this model"], rows)


def _cosines(names: list[str], values: list[list[list[float]]]) -> str:
    table = np.array(values).mean(-1)
    rows = [[name, *(f"{v:.2f}" for v in row)] for name, row in zip(names, table, strict=True)]
    return _table(["", *names], rows)


def totals(training: list[dict[str, Any]]) -> dict[str, int]:
    """Steps, tokens and seconds of a log whose counts start again where training was resumed.

    >>> part = {"step": 5, "tokens": 50, "seconds": 7}
    >>> totals([part, {"step": 9, "tokens": 90, "seconds": 12}, part])
    {'step': 14, 'tokens': 140, 'seconds': 19}
    """
    following = [*training[1:], {"step": 0}]
    last = [a for a, b in zip(training, following, strict=True) if b["step"] <= a["step"]]
    return {key: sum(entry[key] for entry in last) for key in ("step", "tokens", "seconds")}


def card(
    result: dict[str, Any],
    training: list[dict[str, Any]],
    config: dict[str, Any],
    window: int,
    context: int,
) -> str:
    """Markdown for the Hugging Face hub.

    Parameters
    ----------
    result : what `evaluate.measure` returns
    training : the lines of `training_log.jsonl`
    config : the model's configuration
    window, context : tokens per window, and how many of them at least come before a scored token
    """
    spent, routing = totals(training), result["routing"]
    d, f = config["hidden_size"], config["intermediate_size"]
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    k, total = config["num_experts_per_tok"], result["parameters"]
    return TEMPLATE.format(
        layers=layers,
        experts=experts,
        k=k,
        d=d,
        f=f,
        v=config["vocab_size"],
        total=total / 1e6,
        active=(total - layers * (experts - k) * 3 * d * f) / 1e6,
        seen=result["training_tokens"] / 1e6,
        steps=spent["step"],
        rows=round(spent["tokens"] / spent["step"] / (SEQUENCE + 1)),
        sequence=SEQUENCE,
        tokens=spent["tokens"] / 1e6,
        minutes=spent["seconds"] / 60,
        mix=", ".join(f"{domain} {share:.0%}" for domain, share in MIX.items()),
        loss=training[-1]["loss"],
        window=window,
        context=context,
        results=_results(result["texts"]),
        mass=_cosines(routing["domains"], routing["cosine_of_mass"]),
        top=_cosines(routing["domains"], routing["cosine_of_top"]),
        bits=", ".join(f"{b:.2f}" for b in routing["information_bits"]),
        idle=", ".join(map(str, routing["idle_experts"])),
    )

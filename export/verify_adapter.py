"""Check that stock PEFT reads an exported adapter as the server means it.

    python -m export.verify_adapter BASE ADAPTER

Loads BASE with transformers and ADAPTER with `PeftModel.from_pretrained`, and compares with a second model into whose
weights the server's own tensors (`adapter.safetensors`, global names) were added by hand: logits over random text, and
the change of every single expert, so that a dropped tensor cannot hide behind a router that never picks it. An adapter
of an FFT-MoE base is read by our own loader instead (`fft_adapter`), see `verify_fft`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils import logging as transformers_logging

from export import families, verify_fft
from export.checkpoint import Checkpoint, CheckpointError, locate
from export.families import FamilyError
from export.families.family import Family
from protocol import fft_moe, lora, names
from protocol.manifest import PeftLayout
from protocol.tensors import TensorError, decode

log = logging.getLogger(__name__)
TOLERANCE = 1e-4  # largest difference of a logit; the two sums differ in rounding only
ROWS, TOKENS, ANSWER = 4, 64, 8


class VerifyError(ValueError):
    """The adapter is not read as it was meant."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was compared. Differences are the largest absolute ones."""

    tensors: int
    experts_changed: int
    logit_difference: float
    weight_difference: float
    logit_change: float  # how far the adapter moves the base's logits
    reader: str = "stock PEFT"


def _load(path: Path, family: Family) -> Any:
    """The base in float32 with the plain loop over experts, the slow and simple implementation."""
    kind = AutoModelForSeq2SeqLM if family.architecture == "seq2seq" else AutoModelForCausalLM
    model = kind.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def _logits(model: Any, family: Family) -> Any:
    """Answers to the same random text, whatever the model."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS), generator=generator)
    text = {"input_ids": ids}
    if family.architecture == "seq2seq":
        text["decoder_input_ids"] = ids.flip(1)[:, :ANSWER]
    return model(**text).logits


def read_adapter(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The server's own tensors.

    Raises
    ------
    VerifyError
        The file is missing or holds a name that is none of ours.
    """
    path = folder / "adapter.safetensors"
    try:
        tensors = decode(path.read_bytes())
    except FileNotFoundError as error:
        raise VerifyError(
            f"{path}: no such file; an adapter written by the server is wanted"
        ) from error
    except TensorError as error:
        raise VerifyError(f"{path}: {error}") from error
    for name in tensors:
        if names.parse(name) is None:
            raise VerifyError(f"{path}: '{name}' is no adapter tensor")
    return tensors


def changes(
    adapter: dict[str, np.ndarray[Any, Any]],
) -> dict[tuple[int, int, str], np.ndarray[Any, Any]]:
    """(layer, expert, projection or "router") -> the change to the weight."""
    found = {}
    for name, value in adapter.items():
        key = names.parse(name)
        assert key is not None
        if key.factor is None:
            found[key.layer, key.expert, "router"] = value
        elif key.factor == "lora_A":
            b = adapter[name.removesuffix("lora_A") + "lora_B"]
            found[key.layer, key.expert, str(key.projection)] = lora.delta(value, b)
    return found


@torch.no_grad()
def add(model: Any, family: Family, delta: dict[tuple[int, int, str], Any]) -> None:
    """Add every change to the model's own weights."""
    for (layer, expert, what), change in delta.items():
        if what == "router":
            weight = model.get_parameter(family.router.format(layer=layer))[expert]
        elif what in family.fused:
            weight = model.get_parameter(family.fused[what].format(layer=layer))[expert]
        else:
            (name,) = family.split[what]
            weight = model.get_parameter(name.format(layer=layer, expert=expert))
        weight += torch.from_numpy(np.asarray(change, dtype=np.float32))


def _seen(peft: Any, layout: PeftLayout, layer: int, expert: int, projection: str) -> Any:
    """The change that PEFT applies to one projection of one expert."""
    key = layout.key(layout.lora[projection]["lora_A"], layer, expert)
    module = peft.get_submodule(key.removesuffix(".lora_A.weight"))
    change = module.get_delta_weight("default").numpy()
    return change[expert] if isinstance(module, ParamWrapper) else change


@torch.no_grad()
def verify(base: Path, adapter: Path) -> Verdict:
    """Compare stock PEFT with the server's model; raises VerifyError when they differ."""
    checkpoint = Checkpoint(base)
    if (adapter / fft_moe.CONFIG).is_file():
        return _verify_fft(checkpoint, adapter)
    family = families.of(checkpoint.config, str(base))
    config = families.complete(checkpoint.config, str(base))
    tensors = read_adapter(adapter)
    delta = changes(tensors)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(_load(base, family), adapter).eval()
    dropped = [str(w.message) for w in said if "key" in str(w.message)]
    if dropped:
        raise VerifyError(f"{adapter}: PEFT did not take everything: {dropped[0].splitlines()[0]}")

    worst = 0.0
    for layer in family.moe_layers(config):
        for projection in family.projections:
            for expert in range(family.num_experts(config)):
                try:
                    seen = _seen(peft, family.peft, layer, expert, projection)
                except (AttributeError, KeyError) as error:
                    raise VerifyError(
                        f"{adapter}: PEFT holds no {projection} of expert {expert} in layer {layer}"
                    ) from error
                wanted = delta.get((layer, expert, projection), 0.0)
                worst = max(worst, float(np.abs(seen - wanted).max()))

    through_peft = _logits(peft, family)
    ours = _load(base, family)
    plain = _logits(ours, family)
    add(ours, family, delta)
    meant = _logits(ours, family)
    verdict = Verdict(
        tensors=len(tensors),
        experts_changed=len(
            {(layer, e) for (layer, e, what), v in delta.items() if what != "router" and v.any()}
        ),
        logit_difference=float((through_peft - meant).abs().max()),
        weight_difference=worst,
        logit_change=float((meant - plain).abs().max()),
    )
    return _judged(verdict, adapter, float(meant.abs().max()))


def _verify_fft(checkpoint: Checkpoint, adapter: Path) -> Verdict:
    """The same for adapter experts, which our own loader reads."""
    tensors = read_adapter(adapter)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(
        0, model.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    difference, worst, change = verify_fft.compare(model, checkpoint.config, adapter, tensors, ids)
    verdict = Verdict(
        tensors=len(tensors),
        experts_changed=sum(v.any() for n, v in tensors.items() if n.endswith(".lora_B")),
        logit_difference=difference,
        weight_difference=worst,
        logit_change=change,
        reader="our loader",
    )
    return _judged(verdict, adapter, 10.0)


def _judged(verdict: Verdict, adapter: Path, largest: float) -> Verdict:
    """The verdict, once it is good enough beside the largest logit."""
    tolerance = TOLERANCE * max(1.0, largest / 10)
    if not verdict.logit_difference <= tolerance or verdict.weight_difference > 1e-5:
        raise VerifyError(
            f"{adapter}: {verdict.reader} differs from the server's model by "
            f"{verdict.logit_difference:.2e} in a logit and {verdict.weight_difference:.2e} in a weight"
        )
    return verdict


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.verify_adapter",
        description=__doc__.splitlines()[0],
        epilog="example: python -m export.verify_adapter reference_base/model state/adapters/5",
    )
    parser.add_argument("base", help="checkpoint directory or hub id")
    parser.add_argument("adapter", type=Path, help="adapter directory written by the server")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        if not args.adapter.is_dir():
            raise VerifyError(f"{args.adapter}: no such directory")
        verdict = verify(locate(args.base), args.adapter)
    except (CheckpointError, FamilyError, VerifyError) as error:
        print(f"export.verify_adapter: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        # stock PEFT refused the files
        print(
            f"export.verify_adapter: {args.adapter}: {str(error).splitlines()[0]}", file=sys.stderr
        )
        return 2
    print(
        f"ok: {verdict.tensors} tensors, {verdict.experts_changed} experts changed; {verdict.reader} equals the "
        f"server's model to {verdict.logit_difference:.1e} per logit (the adapter moves logits by up to "
        f"{verdict.logit_change:.2f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

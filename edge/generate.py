"""Generate text with the experts of an artifact, and with a trained adapter.

    python -m edge.generate --artifact store/jetson_orin --adapter state/adapters/5 --prompt "The match ended"

`--artifact` is a directory that `python -m export.inference` wrote into. Greedy unless --temperature is given.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge.adapter_files import read_adapter
from edge.decode import (
    RUNTIMES,
    GenerateError,
    Opened,
    Picking,
    folder_of,
    generate,
    open_decoder,
    with_shape,
)
from edge.session import Artifact
from protocol import tensors
from protocol.inference import read_inference
from protocol.manifest import ManifestError, read_base, read_manifest


def open_artifact(folder: Path, adapter: Path | None) -> Opened:
    """Read the indices of an artifact, and the residents' share of an adapter.

    Raises
    ------
    GenerateError, ManifestError
    """
    manifest = read_manifest(folder_of(folder, "manifest.json"))
    plan = read_inference(folder_of(folder, "inference.json"))
    base = read_base(folder_of(folder, "base.json"))
    if {plan.base, manifest.base} != {base.base}:
        raise GenerateError(f"{folder}: its files are of different bases")
    artifact = with_shape(Artifact(base, manifest, folder_of(folder, "blobs")), plan)
    opened = Opened(artifact, plan, {})
    if adapter is None:
        return opened
    try:
        dense = tensors.mapped(artifact.path(base.dense[plan.shape.dense]))
        routers = {
            layer: np.asarray(dense[f"layers.{layer}.router"], np.float32)
            for layer in base.moe_layers
        }
    except (KeyError, tensors.TensorError) as error:
        raise GenerateError(f"{folder}: dense blob: {error}") from error
    return Opened(artifact, plan, read_adapter(adapter, base, plan.shape, opened.resident, routers))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edge.generate",
        description=__doc__.splitlines()[0],
        epilog='example: python -m edge.generate --artifact store/jetson_orin --prompt "The match"',
    )
    parser.add_argument("--artifact", type=Path, required=True, metavar="DIR")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="(default: the base alone)")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--tokens", type=int, default=40, help="at most (default: %(default)s)")
    parser.add_argument(
        "--runtime", choices=sorted(RUNTIMES), default="executorch", help="(default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (the default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    return parser


def run(args: argparse.Namespace) -> str:
    """The prompt and what follows.

    Raises
    ------
    GenerateError, ManifestError
    """
    from tokenizers import Tokenizer

    for name, low, high in (
        ("tokens", 1, 1 << 20),
        ("temperature", 0, 100),
        ("top_p", 1e-6, 1),
        ("threads", 1, 256),
        ("seed", 0, 1 << 62),
    ):
        if not low <= getattr(args, name) <= high:
            option = name.replace("_", "-")
            raise GenerateError(f"--{option} {getattr(args, name)}: {low} to {high} wanted")
    opened = open_artifact(args.artifact, args.adapter)
    base, plan = opened.artifact.base, opened.plan
    path = opened.artifact.path(base.tokenizer)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise GenerateError(f"{path}: no tokenizer: {error}") from error
    prompt = tokenizer.encode(args.prompt).ids
    if not prompt:
        raise GenerateError("--prompt: no tokens in it")
    if len(prompt) + args.tokens > plan.context:
        raise GenerateError(
            f"--prompt of {len(prompt)} tokens and --tokens {args.tokens}: "
            f"{plan.context} together wanted"
        )
    end = base.config.get("eos_token_id")
    decoder = open_decoder(args.runtime, opened, args.threads)
    how = Picking(args.temperature, args.top_p, args.seed)
    made = list(generate(decoder, prompt, args.tokens, how, end if isinstance(end, int) else None))
    decoder.close()
    text: str = tokenizer.decode([*prompt, *made])
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the text."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    logging.getLogger("torch").setLevel(logging.ERROR)  # its own deprecations
    try:
        print(run(args))
    except (GenerateError, ManifestError) as error:
        print(f"edge.generate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

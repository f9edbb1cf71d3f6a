"""Programs that generate text on a device, over the blobs of an artifact that `export.build` wrote.

    python -m export.inference --store store --profile jetson_orin

Writes STORE/blobs/ and STORE/<profile>/inference.json, which `python -m edge.generate` reads. No checkpoint is needed.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export import families, publish
from export.blob_store import BlobStore
from export.decode_graph import DecodeModel, capture
from export.families import FamilyError
from export.families.family import Family
from export.keys import KeyFileError, read_private
from export.to_executorch import lower_methods
from export.to_onnx import OnnxError, to_onnx
from protocol import PROTOCOL_VERSION, inference
from protocol.inference import Decoder, Inference
from protocol.manifest import (
    BaseIndex,
    Manifest,
    ManifestError,
    Shape,
    Slot,
    read_base,
    read_manifest,
)


class InferenceError(ValueError):
    """A choice that does not fit the base."""


def to_executorch_file(
    base: BaseIndex, family: Family, plan: Inference, store: BlobStore
) -> Decoder:
    """One ExecuTorch program with `prefill` and `decode`; experts, dense matrices and adapter are inputs."""
    models = {
        name: DecodeModel(base, family, plan.shape, chunk, plan.context)
        for name, chunk in (("prefill", plan.chunk), ("decode", 1))
    }
    # For one token XNNPACK's calls cost as much as they save (docs/experiments.md).
    graphs = {name: capture(model) for name, model in models.items()}
    lowered = lower_methods(graphs, delegated=("prefill",))
    model = models["decode"]
    return Decoder(
        blob=store.put(lowered.program),
        inputs=tuple(model.specs),
        outputs=model.output_names(),
        arena_bytes=lowered.arena_bytes,
    )


def to_onnx_file(base: BaseIndex, family: Family, plan: Inference, store: BlobStore) -> Decoder:
    """One ONNX model that names the blobs of the experts and of the dense part; only the adapter is an input."""
    model = DecodeModel(base, family, plan.shape, max(plan.chunk, 2), plan.context)
    resident = {int(layer): ids for layer, ids in plan.experts.items()}
    made = to_onnx(model, resident, store.folder)
    names = {value.name for value in made.graph.input}
    one = [replace(s, shape=(1, 1)) if s.name == "tokens" else s for s in model.specs]
    return Decoder(
        blob=store.put(made.SerializeToString(deterministic=True)),
        inputs=tuple(spec for spec in one if spec.name in names),
        outputs=model.output_names(),
        arena_bytes=0,
    )


RUNTIMES: dict[str, Callable[[BaseIndex, Family, Inference, BlobStore], Decoder]] = {
    "executorch": to_executorch_file,
    "onnx": to_onnx_file,
}


def build(
    base: BaseIndex,
    artifact: Manifest,
    out: Path,
    *,
    context: int,
    chunk: int,
    rank: int | None,
    runtimes: Sequence[str],
    key: Ed25519PrivateKey | None = None,
    advance: Callable[[str], None],
) -> Inference:
    """Write the programs of `runtimes` for the experts that an artifact holds.

    Parameters
    ----------
    context : int
        Tokens that prompt and answer may have together.
    chunk : int
        Tokens of the prompt that are read in one call.
    rank : int or None
        Largest rank of an adapter that can be loaded; None takes the largest rank of the artifact.
    key : Ed25519PrivateKey or None
        Signs `inference.json`, as it signed the manifest.
    advance : callable
        Told of each finished runtime.

    Raises
    ------
    InferenceError, FamilyError, KeyFileError, OnnxError
    """
    publish.check_key(out, key)
    longest = int(base.config.get("max_position_embeddings", context))
    if not 2 <= context <= longest:
        raise InferenceError(f"--context {context}: 2 to {longest} wanted, the base reads no more")
    if not 2 <= chunk <= context:
        raise InferenceError(f"--chunk {chunk}: 2 to {context} wanted")
    family = families.of(base.config, str(out))
    plan = Inference(
        protocol=PROTOCOL_VERSION,
        base=base.base,
        profile=artifact.profile,
        shape=_shape(base, artifact.shape, rank),
        context=context,
        chunk=chunk,
        experts=artifact.experts,
        decoders={},
    )
    store = BlobStore(out)
    for runtime in runtimes:
        decoder = RUNTIMES[runtime](base, family, plan, store)
        plan = replace(plan, decoders={**plan.decoders, runtime: decoder})
        advance(runtime)
    publish.write(out / plan.profile / "inference.json", inference.to_json(plan), key)
    return plan


def _shape(base: BaseIndex, shape: Shape, rank: int | None) -> Shape:
    """The artifact's slots, all with one rank: an adapter changes frozen slots as well."""
    if base.projections == ("adapter",):
        return shape  # the rank is the width of the adapter's expert
    most = rank or max(slot.rank for layer in shape.slots for slot in layer)
    slots = tuple(tuple(Slot(format=s.format, rank=most) for s in layer) for layer in shape.slots)
    return replace(shape, slots=slots)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.inference",
        description=__doc__.splitlines()[0],
        epilog="example: python -m export.inference --store store --profile jetson_orin",
    )
    parser.add_argument("--store", type=Path, default=Path("store"), help="(default: %(default)s)")
    parser.add_argument("--profile", required=True, help="name of a profile built into the store")
    parser.add_argument(
        "--context",
        type=int,
        default=256,
        help="tokens of prompt and answer (default: %(default)s)",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=32,
        help="prompt tokens read in one call (default: %(default)s)",
    )
    parser.add_argument("--rank", type=int, help="largest adapter rank (default: the artifact's)")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign with the store's key")
    parser.add_argument(
        "--runtime",
        action="append",
        choices=sorted(RUNTIMES),
        help="repeatable (default: all of them)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the artifact's path last."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        if args.rank is not None and not 0 < args.rank <= 4096:
            raise InferenceError(f"--rank {args.rank}: 1 to 4096 wanted")
        base = read_base(args.store / "base.json")
        artifact = read_manifest(args.store / args.profile / "manifest.json")
        plan = build(
            base,
            artifact,
            args.store,
            context=args.context,
            chunk=args.chunk,
            rank=args.rank,
            runtimes=args.runtime or sorted(RUNTIMES),
            key=None if args.sign is None else read_private(args.sign),
            advance=lambda runtime: print(f"{runtime}: done", file=sys.stderr, flush=True),
        )
    except (FamilyError, InferenceError, KeyFileError, ManifestError, OnnxError, OSError) as error:
        print(f"export.inference: {error}", file=sys.stderr)
        return 2
    for runtime, decoder in plan.decoders.items():
        print(f"{runtime}: {decoder.blob.bytes / 1e3:.0f} kB", file=sys.stderr)
    print(args.store / args.profile)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

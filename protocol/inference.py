"""How a device of one profile generates text, over the blobs it trains with: STORE/<profile>/inference.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from protocol import PROTOCOL_VERSION, schema
from protocol.manifest import Blob, ManifestError, Shape, TensorSpec, read_json


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """One file that generates, and how to call it.

    Letters: T tokens of a call, C cache places, H key-value heads, D head size, V vocabulary.

    `inputs` in calling order: `tokens` int64 [1, T], `start` int64 [1] (tokens in the cache), `last` int64 [1] (place
    in the call whose logits are wanted), `cache.l.key` float32 [H, D, C] and `cache.l.value` [H, C, D] for each layer,
    of which the first `start` places count; then what `manifest.Program` describes, as far as the file does not hold
    it, and last the adapter. `outputs`: `logits` [1, V], `new.l.key` [H, D, T] and `new.l.value` [H, T, D], to be
    written into the cache from place `start` on; tokens that only fill up a call are left out.

    An ExecuTorch file has the methods `prefill` (T = `Inference.chunk`) and `decode` (T = 1), whose inputs differ in
    `tokens` alone. An ONNX file takes any T and names the blobs of the experts, which lie in its folder.
    """

    blob: Blob
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    arena_bytes: int  # the larger of both methods; 0 where the runtime plans for itself


@dataclass(frozen=True, kw_only=True)
class Inference:
    """The programs of a profile that generate. Every slot has the rank of the largest adapter that fits."""

    protocol: int
    base: str
    profile: str
    shape: Shape
    context: int
    chunk: int
    experts: dict[str, tuple[int, ...]]  # layer -> global ids in slot order
    decoders: dict[str, Decoder]  # runtime ->


def read_inference(path: Path) -> Inference:
    """Read `inference.json`; raises ManifestError with one line."""
    try:
        inference = schema.from_dict(Inference, read_json(path), str(path))
    except schema.SchemaError as error:
        raise ManifestError(str(error)) from error
    if inference.protocol != PROTOCOL_VERSION:
        raise ManifestError(
            f"{path}: protocol {inference.protocol} found, {PROTOCOL_VERSION} wanted"
        )
    return inference


def to_json(inference: Inference) -> bytes:
    """Canonical bytes: the same value gives the same file."""
    return json.dumps(schema.to_dict(inference), sort_keys=True, indent=1).encode() + b"\n"

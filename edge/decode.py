"""Generating with a key-value cache, whatever runs the program. Arrays in, arrays out.

Letters: T tokens of a call, C cache places, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge import slots
from edge.session import Artifact, FloatArrays
from protocol.inference import Inference
from protocol.manifest import TensorSpec

Arrays = Mapping[str, NDArray[Any]]
Call = Callable[[str, dict[str, NDArray[Any]]], Arrays]
"""("prefill" | "decode", inputs that change) -> outputs by name, valid until the next call."""


class GenerateError(RuntimeError):
    """An artifact, an adapter or a prompt that nothing can be generated from."""


class Decoder(Protocol):
    """A model in the middle of a text."""

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Take in more tokens; logits [V] of the one after them."""

    def restart(self) -> None:
        """Forget the text."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(frozen=True)
class Opened:
    """What a runtime opens: the artifact with the shape that generates, its plan, and the adapter by global names."""

    artifact: Artifact
    plan: Inference
    adapter: FloatArrays

    @property
    def resident(self) -> dict[int, tuple[int, ...]]:
        """MoE layer -> global expert ids in slot order."""
        return {int(layer): ids for layer, ids in self.plan.experts.items()}


def adapter_inputs(opened: Opened) -> FloatArrays:
    """The adapter as the flat arrays that a program takes; zero where it has nothing."""
    base, shape = opened.artifact.base, opened.plan.shape
    flat: FloatArrays = {}
    for (layer, ids), kinds in zip(opened.resident.items(), shape.slots, strict=True):
        rank = sum(slot.rank for slot in kinds)
        for projection in base.projections:
            out, features = base.features(projection)
            flat[f"layers.{layer}.{projection}.a"] = np.zeros(rank * features, np.float32)
            flat[f"layers.{layer}.{projection}.b"] = np.zeros(rank * out, np.float32)
        flat[f"layers.{layer}.router"] = np.zeros((len(ids), base.hidden), np.float32)
        flat[f"layers.{layer}.output_scale"] = np.ones(1, np.float32)
    for name, view in slots.views(flat, base, shape, opened.resident).items():
        if name in opened.adapter:
            view[...] = opened.adapter[name]
    return flat


RUNTIMES = {
    "executorch": "edge.decoder_executorch",
    "onnx": "edge.decoder_onnx",
    "transformers": "edge.decoder_torch",
}


def open_decoder(runtime: str, opened: Opened, threads: int) -> Decoder:
    """Import the one runtime that is used, and open its program.

    Raises
    ------
    GenerateError
        Its libraries are not installed, or the artifact has no program for it.
    """
    try:
        module = importlib.import_module(RUNTIMES[runtime])
    except ImportError as error:
        raise GenerateError(f"runtime {runtime} cannot be loaded: {error}") from error
    decoder: Decoder = module.open_decoder(opened, threads)
    return decoder


class CachedDecoder:
    """A program with a cache outside: fills it, and reads a prompt in as few calls as possible.

    Parameters
    ----------
    whole : bool
        The program takes any number of tokens at once; else only `chunk`, filled up, or one.
    """

    def __init__(
        self, call: Call, inputs: Sequence[TensorSpec], plan: Inference, *, whole: bool
    ) -> None:
        self._call, self._chunk, self._whole = call, plan.chunk, whole
        self._context, self._held = plan.context, 0
        self._caches = {
            spec.name: np.zeros(spec.shape, np.float32)
            for spec in inputs
            if spec.name.startswith("cache.")
        }

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `Decoder`."""
        if self._held + len(tokens) > self._context:
            raise GenerateError(
                f"{self._held + len(tokens)} tokens, the program holds {self._context}"
            )
        logits = np.empty(0, np.float32)
        for at in range(0, len(tokens), self._chunk):
            logits = self._step(tokens[at : at + self._chunk])
        return logits

    def _step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        count, held = len(tokens), self._held
        method = "decode" if count == 1 else "prefill"
        row = np.zeros((1, count if self._whole or count == 1 else self._chunk), np.int64)
        row[0, :count] = tokens
        given = {"tokens": row, "start": np.array([held]), "last": np.array([count - 1])}
        seen = self._call(method, {**given, **self._caches})
        for name, cache in self._caches.items():
            new = seen[name.replace("cache.", "new.", 1)]
            if name.endswith(".key"):
                cache[:, :, held : held + count] = new[:, :, :count]
            else:
                cache[:, held : held + count] = new[:, :count]
        self._held += count
        return np.array(seen["logits"].reshape(-1), dtype=np.float32)

    def restart(self) -> None:
        """See `Decoder`."""
        self._held = 0  # what the cache holds beyond is not looked at

    def close(self) -> None:
        """See `Decoder`."""
        self._caches = {}


@dataclass(frozen=True)
class Picking:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the likeliest `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def pick(logits: NDArray[np.float32], how: Picking, rng: np.random.Generator) -> int:
    """The next token.

    >>> pick(np.array([0.0, 2.0, 1.0], np.float32), Picking(), np.random.default_rng(0))
    1
    """
    if how.temperature == 0:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / how.temperature
    share = np.exp(scores - scores.max())
    share /= share.sum()
    order = np.argsort(-share, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(share[order]), how.top_p)) + 1]
    return int(rng.choice(kept, p=share[kept] / share[kept].sum()))


def generate(
    decoder: Decoder, prompt: Sequence[int], count: int, how: Picking, stop: int | None
) -> Iterator[int]:
    """Up to `count` tokens after the prompt, one by one; ends after `stop`, which is not given out."""
    rng = np.random.default_rng(how.seed)
    logits = decoder.read(prompt)
    for left in range(count, 0, -1):
        token = pick(logits, how, rng)
        if token == stop:
            return
        yield token
        if left > 1:
            logits = decoder.read([token])


def with_shape(artifact: Artifact, plan: Inference) -> Artifact:
    """The artifact as the generating programs see it."""
    return Artifact(
        artifact.base,
        replace(artifact.manifest, shape=plan.shape, experts=plan.experts),
        artifact.blobs,
    )


def folder_of(path: Path, name: str) -> Path:
    """Where `name` lies: in the artifact's directory, or beside it as in a store.

    Raises
    ------
    GenerateError
    """
    for folder in (path, path.parent):
        if (folder / name).exists():
            return folder / name
    raise GenerateError(f"{path}: no {name} there or in {path.parent}")

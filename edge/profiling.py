"""Routing statistics of the whole model on a device that cannot hold it: layer after layer, expert after expert.

For each decoder layer: attention and router for all batches, then each expert once, for its tokens of all batches.
Hidden states wait on flash in between. An expert that is not resident is fetched, used and dropped. So the peak is the
dense part of a layer, one expert and a batch's buffers, whatever the model's size and the number of rows.

Statistics are those of `protocol.update.STATS` for all experts of all layers, as transformers would route the same
text. Token routes exist in memory only while their layer is at work; what is given back are sums. See `edge.privacy`.

Rows may be a sample (`choose_rows`). Profiles may be stale: an update carries its lease's round, and the server goes on
choosing by the last profile it has until a newer one comes (stale profiling, Flux, arXiv 2508.19078).

Letters: N batches, B batch rows, S tokens per row, T = B * S, k experts per token, C tokens of an expert at a time, L
MoE layers, E experts, d hidden, R rank.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge import native, privacy
from edge.data import Prompter, Row, evaluation_batches
from edge.rows_file import RowsFile
from edge.session import Artifact, Batch, FloatArrays, Resident, SessionError
from edge.slots import SlotError
from edge.trainer import Result
from protocol import names, tensors, update
from protocol.manifest import Blob, Profiling, Program
from protocol.messages import Lease

log = logging.getLogger(__name__)
Arrays = Mapping[str, NDArray[Any]]
Borrow = Callable[[Blob], AbstractContextManager[Path]]
QUANTILE = 100
"""`high` is the ceil(T / 100)-th largest probability: a 0.99 quantile over the places of a batch."""


@dataclass(frozen=True)
class Profiled:
    """What a profile gives.

    Attributes
    ----------
    stats : [L, E] each, named as in `update.STATS`
    tokens : that were counted; with a clip, at most so many of each row
    label_mass : float64 [labels, L, E], router mass by the row's label: soft counts. Never sent, and never clipped
    """

    stats: FloatArrays
    tokens: int
    label_mass: NDArray[np.float64]

    def missed_mass(self, moe_layers: Sequence[int], resident: Resident) -> tuple[float, ...]:
        """Share of each layer's router mass on experts that are not resident, in [0, 1]."""
        mass = self.stats["mass"].astype(np.float64)
        held = np.array(
            [m[list(resident[la])].sum() for la, m in zip(moe_layers, mass, strict=True)]
        )
        share = 1 - held / np.maximum(mass.sum(-1), 1e-9)
        return tuple(float(x) for x in np.clip(share, 0, 1))


@dataclass
class _Text:
    """What is known of the batches while layers go by."""

    valid: list[NDArray[np.bool_]] = field(default_factory=list)  # [B, S] each
    labels: list[NDArray[np.int64]] = field(default_factory=list)  # [B] each


@dataclass
class _Routes:
    """Where the tokens of one layer go, all batches after one another."""

    weight: NDArray[np.float32]  # [N * T, k]
    expert: NDArray[np.int32]  # [N * T, k]; -1 for padding


class _Open:
    """A program at work; closes with the `with` it is opened in."""

    def __init__(self, artifact: Artifact, spec: Program) -> None:
        self.spec = spec
        try:
            self._program = native.Program(artifact.path(spec.blob))
        except native.NativeError as error:
            raise SessionError(str(error)) from error

    def run(self, given: Arrays) -> dict[str, NDArray[Any]]:
        """Outputs by name, in the program's own memory; raises SessionError for inputs that do not fit."""
        values, where = [], f"program {self.spec.blob.sha256[:12]}"
        for spec in self.spec.inputs:
            value = given.get(spec.name)
            if value is not None and spec.name.endswith((".packed", ".scale")):
                value = value.reshape(-1)
            if value is None or value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
                found = "nothing" if value is None else f"{value.dtype} {value.shape}"
                raise SessionError(
                    f"{where}: {spec.name} is {found}, {spec.dtype} {spec.shape} wanted"
                )
            values.append(np.ascontiguousarray(value))
        try:
            outputs = self._program.run(self.spec.method, values)
        except native.NativeError as error:
            raise SessionError(f"{where}: {error}") from error
        if len(outputs) != len(self.spec.outputs):
            raise SessionError(f"{where}: {len(outputs)} outputs, {self.spec.outputs} wanted")
        return dict(zip(self.spec.outputs, outputs, strict=True))

    def close(self) -> None:
        """Give the memory back."""
        self._program.close()


def batch_sums(
    g: NDArray[np.float32], valid: NDArray[np.bool_], top_k: int
) -> dict[str, NDArray[np.float64]]:
    """Statistics of a router's probabilities, row by row of the batch.

    Parameters
    ----------
    g : [B, S, E]
    valid : [B, S]

    Returns
    -------
    `mass`, `top`, `g_log_g` [B, E], see `update.STATS`; `peak`, `high` [E], the largest and the ceil(T / 100)-th
    largest probability among the valid tokens (HFedMoE eq. 4, arXiv 2601.00583, and a quantile that does not grow with
    T)

    Examples
    --------
    >>> sums = batch_sums(np.array([[[0.75, 0.25], [0.5, 0.5]]], np.float32), np.array([[True, False]]), 1)
    >>> sums["mass"].tolist(), sums["top"].tolist(), sums["peak"].tolist()
    ([[0.75, 0.25]], [[0.75, 0.0]], [0.75, 0.25])
    """
    wide = g.astype(np.float64) * valid[..., None]
    floor = np.partition(g, -top_k, -1)[..., -top_k, None]
    seen = g[valid]  # [tokens, E]
    largest = np.zeros((2, g.shape[-1]))
    if len(seen):
        rank = min(math.ceil(valid.size / QUANTILE), len(seen))
        largest = np.array([seen.max(0), np.partition(seen, -rank, 0)[-rank]], np.float64)
    return {
        "mass": wide.sum(1),
        "top": (wide * (g >= floor)).sum(1),
        "g_log_g": (wide * np.log(g.astype(np.float64) + 1e-20)).sum(1),
        "peak": largest[0],
        "high": largest[1],
    }


class _Walk:
    """One profile: the layers in order. `clip` as in `edge.privacy`, 0: none."""

    def __init__(
        self,
        artifact: Artifact,
        profiling: Profiling,
        borrow: Borrow,
        adapter: Callable[[], Arrays],
        hidden: RowsFile,
        x: RowsFile,
        clip: float,
        every: bool,
        check: Callable[[], None],
    ) -> None:
        self.artifact, self.profiling, self.borrow = artifact, profiling, borrow
        self.read_adapter, self.adapter = adapter, adapter()
        self.hidden, self.x, self.check, self.every = hidden, x, check, every
        base, shape = artifact.base, artifact.manifest.shape
        self.base, self.places = base, shape.batch * shape.sequence
        self.size = (shape.batch, shape.sequence, base.hidden)
        self.most = {n: clip * b for n, b in privacy.bounds(base.num_experts, base.hidden).items()}
        self.text = _Text()
        layers, experts = len(base.moe_layers), base.num_experts
        known = {*update.STATS, *self.most, "peak", "high"}
        self.sums = {name: np.zeros((layers, experts)) for name in sorted(known)}
        self.label_mass = np.zeros((0, layers, experts))

    def embed(self, batches: Iterable[Batch]) -> None:
        """Hidden states of every batch before the first layer."""
        dense = {f"dense.{n}": v for n, v in self._dense().items()}
        with closing(_Open(self.artifact, self.profiling.embed)) as program:
            for n, batch in enumerate(batches):
                self.check()
                rows = program.run({**dense, "tokens": batch.tokens})["hidden"]
                self.hidden.write(n * self.places, rows.reshape(self.places, -1))
                self.text.valid.append(batch.valid > 0)
                self.text.labels.append(batch.labels)

    def label(self, count: int) -> None:
        """Room for the soft counts of so many labels."""
        self.label_mass = np.zeros((count, *self.label_mass.shape[1:]))

    def layer(self, layer: int) -> None:
        """One decoder layer, for all batches."""
        # As with the dense part: what the layer before read of the adapter is given back.
        self.adapter = self.read_adapter()
        place = self.profiling.place.replace("{layer}", str(layer))
        row = self.base.moe_layers.index(layer) if layer in self.base.moe_layers else None
        routes = self._attend(layer, place, row)
        if row is not None:
            self._experts(layer, row, routes)

    def _dense(self) -> dict[str, NDArray[Any]]:
        # Mapped anew for each layer: what the one before touched is no longer this process's memory.
        return tensors.mapped(self.artifact.path(self.artifact.manifest.dense))

    def _attend(self, layer: int, place: str, row: int | None) -> _Routes:
        dense = self._dense()
        given = {f"dense.{n[len(place) :]}": v for n, v in dense.items() if n.startswith(place)}
        if row is not None:
            given |= self._router(layer, dense)
        count, k = len(self.text.valid), self.base.top_k
        routes = _Routes(
            np.zeros((count * self.places, k), np.float32),
            np.full((count * self.places, k), -1, np.int32),
        )
        program = _Open(self.artifact, self.profiling.layers[self.profiling.kinds[layer]])
        with closing(program):
            for n, valid in enumerate(self.text.valid):
                self.check()
                start, end = n * self.places, (n + 1) * self.places
                given["hidden"] = self.hidden.read(start, self.places).reshape(self.size)
                seen = program.run(given)
                self.hidden.write(start, seen["hidden"].reshape(self.places, -1))
                if row is not None:
                    self.x.write(start, seen["x"])
                    routes.weight[start:end] = seen["weight"]
                    there = valid.reshape(-1, 1)
                    routes.expert[start:end] = np.where(there, seen["expert"], -1)
                    self._count(row, seen["g"].reshape(*valid.shape, -1), n)
        return routes

    def _router(self, layer: int, dense: Arrays) -> dict[str, NDArray[Any]]:
        prefix = f"layers.{layer}.router"
        given = {
            "router" + name[len(prefix) :]: np.asarray(value, np.float32)
            for name, value in dense.items()
            if name == prefix or name.startswith(f"{prefix}.")
        }
        moved = np.array(given.get("router", np.zeros((0, 0), np.float32)))
        for expert in range(len(moved)):
            moved[expert] += self._adapted(names.router_row(layer, expert), 0.0)
        return {**given, "router": moved}

    def _count(self, row: int, g: NDArray[np.float32], n: int) -> None:
        sums = batch_sums(g, self.text.valid[n], self.base.top_k)
        for name in ("mass", "top", "g_log_g"):
            self.sums[name][row] += privacy.clipped_sum(sums[name], self.most[name])
        for name in ("peak", "high"):
            self.sums[name][row] += sums[name] / len(self.text.valid)
        for label, mass in zip(self.text.labels[n], sums["mass"], strict=True):
            if 0 <= label < len(self.label_mass):
                self.label_mass[label, row] += mass

    def _experts(self, layer: int, row: int, routes: _Routes) -> None:
        """Each expert once, for its tokens of all batches; padding goes nowhere."""
        rows = len(self.text.valid) * self.size[0]
        norms = np.zeros((rows, self.base.num_experts), np.float32)
        last = layer == self.base.moe_layers[-1]  # nobody reads its output
        blobs = self.base.experts[self.profiling.format][row]
        with closing(_Open(self.artifact, self.profiling.expert)) as program:
            for expert, blob in enumerate(blobs):
                self.check()
                token, place = np.nonzero(routes.expert == expert)
                # With noise asked for, what is fetched must not tell which experts had no token.
                if not len(token) and not self.every:
                    continue
                with self.borrow(blob) as path:
                    given = tensors.mapped(path) | self._factors(layer, expert)
                    weight = routes.weight[token, place]
                    seen = self._expert(program, given, token, weight, add=not last)
                    np.add.at(norms[:, expert], token // self.size[1], weight * seen)
        self.sums["output_norm"][row] = privacy.clipped_sum(norms, self.most["output_norm"])

    def _expert(
        self,
        program: _Open,
        given: dict[str, NDArray[Any]],
        token: NDArray[np.int64],
        weight: NDArray[np.float32],
        *,
        add: bool,
    ) -> NDArray[np.float32]:
        """Norms [n] of an expert's output for these tokens; what it gives goes into the hidden states."""
        columns = program.spec.inputs[0].shape[0]
        given["x"] = np.zeros((columns, self.base.hidden), np.float32)
        norms = np.zeros(len(token), np.float32)
        for start in range(0, len(token), columns):
            ids = token[start : start + columns]
            given["x"][: len(ids)] = self.x.take(ids)
            seen = program.run(given)
            norms[start : start + columns] = seen["norms"][: len(ids)]
            if add:
                share = weight[start : start + columns, None] * np.float32(self.profiling.scale)
                self.hidden.add(ids, seen["y"][: len(ids)] * share)
        return norms

    def _adapted(self, name: str, default: Any) -> Any:
        """A tensor of the adapter; raises SlotError when it is not finite."""
        value = self.adapter.get(name, default)
        if not np.isfinite(value).all():
            raise SlotError(f"adapter: {name} is not finite")
        return value

    def _factors(self, layer: int, expert: int) -> dict[str, NDArray[np.float32]]:
        """The expert's LoRA as the program takes it: rank R, zeros where the adapter has less, or nothing."""
        rank, made = self.profiling.rank, {}
        for projection in self.base.projections:
            out, features = self.base.features(projection)
            a, b = np.zeros((rank, features), np.float32), np.zeros((out, rank), np.float32)
            lora_a, lora_b = (names.lora(layer, expert, projection, f) for f in names.FACTORS)
            if lora_a in self.adapter and lora_b in self.adapter:
                given_a, given_b = self._adapted(lora_a, a), self._adapted(lora_b, b)
                r = min(rank, len(given_a))
                a[:r], b[:, :r] = given_a[:r], given_b[:, :r]
            made[f"{projection}.a"], made[f"{projection}.b"] = a.reshape(-1), b.reshape(-1)
        return made


def profile(
    artifact: Artifact,
    borrow: Borrow,
    batches: Iterable[Batch],
    scratch: Path,
    *,
    labels: int = 0,
    adapter: Callable[[], Arrays] = dict,
    clip: float = 0.0,
    noise: float = 0.0,
    rng: np.random.Generator | None = None,
    check: Callable[[], None] = lambda: None,
) -> Profiled:
    """Run the whole model over `batches` and count where its routers send them.

    Parameters
    ----------
    borrow : gives an expert's blob for as long as a `with` lasts, see `BlobCache.borrow`
    scratch : folder with room for 8 * d bytes per place of all batches
    labels : how many the task has
    adapter : gives global names, of any experts, called anew for each layer; by default the base is profiled as it is
    clip, noise : see `edge.privacy`
    rng : draws the noise; by default seeded from the system
    check : called between programs' runs; raises to stop

    Raises
    ------
    SessionError
        The manifest has no programs for it, or a blob does not fit them.
    SlotError
        The adapter does not belong to the base, or is not finite.
    ValueError
        Noise without a clip.
    """
    profiling, base = artifact.manifest.profiling, artifact.base
    if profiling is None:
        raise SessionError("the artifact has no programs that profile the whole model")
    privacy.check(clip, noise)
    with ExitStack() as stack:
        hidden, x = (stack.enter_context(closing(RowsFile(scratch, base.hidden))) for _ in range(2))
        try:
            check_adapter(adapter(), artifact)
            walk = _Walk(artifact, profiling, borrow, adapter, hidden, x, clip, noise > 0, check)
            walk.label(labels)
            walk.embed(batches)
            for layer in range(len(profiling.kinds)):
                walk.layer(layer)
        except tensors.TensorError as error:
            raise SessionError(str(error)) from error
        log.info("profiled: %.1f MB of hidden states on flash", (hidden.bytes + x.bytes) / 1e6)
    stats = {n: walk.sums[n].astype(np.float32) for n in update.STATS}
    tokens = int(sum(valid.sum() for valid in walk.text.valid))
    if clip:
        rng = rng or np.random.default_rng(secrets.randbits(128))
        stats = privacy.noised(stats, clip, noise, base.hidden, rng)
        tokens = round(float(stats["mass"].sum(-1, dtype=np.float64).max()))
    return Profiled(stats, tokens, walk.label_mass)


def check_adapter(adapter: Arrays, artifact: Artifact) -> None:
    """Raise SlotError unless every tensor belongs to one of the base's experts and has its shape."""
    base = artifact.base
    for name, value in adapter.items():
        key = names.parse(name)
        wanted: tuple[int, ...] = (base.hidden,)
        known = key is not None and key.layer in base.moe_layers and key.expert < base.num_experts
        if known and key is not None and key.projection is not None:
            known = key.projection in base.projections
            out, features = base.features(key.projection)
            rank = value.shape[0 if key.factor == "lora_A" else -1] if value.ndim == 2 else 0
            wanted = (rank, features) if key.factor == "lora_A" else (out, rank)
        if not known or value.shape != wanted or value.dtype != np.float32:
            raise SlotError(
                f"adapter: {name[:80]!r} is {value.dtype} {value.shape}, no part of the base's"
            )


def choose_rows(
    train: Sequence[Row], held_back: Sequence[Row], count: int, batch: int, seed: int
) -> list[Row]:
    """The rows to profile on: `count` drawn from all, or, at 0, the held-back ones and as many training rows.

    >>> rows = [Row(str(i)) for i in range(4)]
    >>> [row.text for row in choose_rows(rows[:2], rows[2:], 3, 1, 0)]
    ['0', '2', '3']
    """
    rng = np.random.default_rng(seed)
    if count:
        both = [*held_back, *train]
        return [both[i] for i in rng.permutation(len(both))[:count]]
    order = rng.permutation(len(train))
    return [*held_back, *(train[i] for i in order[: max(len(held_back), batch)])]


def complete(
    result: Result,
    lease: Lease,
    artifact: Artifact,
    borrow: Borrow,
    prompts: Prompter,
    rows: Sequence[Row],
    resident: Resident,
    scratch: Path,
    check: Callable[[], None],
) -> Result:
    """A lease's result, its statistics replaced by those of the whole model; raises as `profile`."""
    with ExitStack() as stack:
        adapter: Callable[[], Arrays] = dict
        if lease.profile_adapter is not None:
            path = stack.enter_context(borrow(lease.profile_adapter))
            adapter = partial(tensors.mapped, path)
        found = profile(
            artifact,
            borrow,
            evaluation_batches(prompts, rows),
            scratch,
            labels=0 if prompts.verbaliser is None else len(prompts.verbaliser.labels),
            adapter=adapter,
            clip=lease.profile_clip,
            noise=lease.profile_noise,
            check=check,
        )
    missed = found.missed_mass(artifact.base.moe_layers, resident)
    return replace(result, stats=found.stats, tokens=found.tokens, missed_mass=missed)

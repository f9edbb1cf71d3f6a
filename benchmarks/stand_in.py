"""What a token does whose expert is absent: masking, the nearest resident, or a merged stand-in; on real text.

    python -m benchmarks.stand_in --data DIR --work DIR [--base CHECKPOINT] [--shares 0.15 0.25 0.5] [--seeds 0,1,2]

Clients, rows and budgets are those of the scoreboard's `agnews-0.1` (30 clients, Dirichlet 0.1 over the labels; a seed
has clients of its own). Nothing is trained: the base answers a client's held-back rows with the experts that the server
would give it for an evaluation. Ways, each against the whole base on the same rows:

    masking       the router chooses among residents alone, as the product does
    nearest       the whole router chooses; an absent expert is answered by the resident whose outputs are most like its
                  own (cosine over held-out text, which is no client's)
    reroute       the weights of all experts first move to their nearest residents, then the heaviest slots answer
    merged        masking, and in one slot more the average of all absent experts by the client's use of them
    merged-even   the same in the place of the resident of least value: as much memory as the others

Prints means over seeds of the clients' means, and the difference to masking with Student's 95 % interval, paired over
seeds: answer loss in nats a token, accuracy, distance of the last hidden states as a share of their norm, KL of the
answers' tokens in nats; and how like an absent expert its nearest resident is. WORK/lines.jsonl has every client. Not
measured: adapters that were trained in one of these ways, and more than one stand-in in a layer. Letters: L MoE layers,
E experts, P slots, d width, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.federated import measure, methods, simulate, suites, tasks
from benchmarks.federated import world as worlds
from benchmarks.federated.__main__ import REFERENCE, numbers
from benchmarks.federated.compare import t_interval
from benchmarks.federated.world import World
from edge.data import Row, evaluation_batches
from edge.routed_torch import Body, RoutedBackend, RoutedBlock, RoutedSession, Seen
from edge.session import PLAIN, Artifact, Resident
from protocol import packing
from server import stand_in

Line = dict[str, Any]
Floats = NDArray[np.float64]
Stats = dict[str, NDArray[np.float32]]
SUITE = suites.SUITES["agnews-0.1"]
WAYS = ("masking", "nearest", "reroute", "merged", "merged-even")
MEASURES = ("answer_loss", "accuracy", "hidden", "kl")
WINDOWS = 16  # of held-out text for fingerprints


class StandInBlock(RoutedBlock):
    """A sparse block whose router may send what is absent somewhere. `fill` makes it mask again."""

    slot: Tensor | None = None  # [E] resident that serves each expert
    first: bool = False  # weights move before the heaviest are taken, not after
    bias: Tensor | None = None  # [P] of the router
    heard: list[Tensor] | None = None  # inputs, where somebody listens

    def fill(self, ids: Sequence[int], frozen: tuple[Tensor, Tensor], rank: int) -> None:
        """See `RoutedBlock`."""
        super().fill(ids, frozen, rank)
        self.slot, self.first, self.bias, self.heard = None, False, None, None

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, d] -> the same shape; without gradients, router changes and output scale."""
        run = self.run
        assert run is not None
        x = hidden.reshape(-1, hidden.shape[-1])
        if self.heard is not None:
            self.heard.append(x)
        if run.statistics or (self.slot is None and self.bias is None):
            return super().forward(hidden)
        if self.slot is None:
            g = (x @ self.rows.t() + self.bias).softmax(-1)
            weight, slot = g.topk(min(self.top_k, len(self.ids)), -1)
        elif self.first:
            g = (x @ self.router.t()).softmax(-1)
            moved = torch.zeros(len(x), len(self.ids)).index_add_(1, self.slot, g)
            weight, slot = moved.topk(min(self.top_k, len(self.ids)), -1)
        else:
            weight, chosen = (x @ self.router.t()).softmax(-1).topk(self.top_k, -1)
            slot = self.slot[chosen]
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        self.seen = Seen()
        y = self._experts(
            x, weight, slot, run.answers if self.last else None, tuple(self.parameters_[:4])
        )
        return y.view(hidden.shape)

    def outputs(self, x: Tensor) -> Floats:
        """Output of every resident on the same tokens, [P, tokens * d]."""
        factors = [t.detach() for t in self.parameters_[:4]]
        each = [self._one(x, p, factors).reshape(-1) for p in range(len(self.ids))]
        found: Floats = torch.stack(each).double().numpy()
        return found


class StandInBackend(RoutedBackend):
    """The fast torch backend with such blocks."""

    def body(self, artifact: Artifact) -> Body:
        """See `RoutedBackend`."""
        body = super().body(artifact)
        for layer, block in body.blocks.items():
            if not isinstance(block, StandInBlock):
                ours = StandInBlock(block.router, block.renormalise, block.top_k, block.last)
                ours.layer = layer
                body.blocks[layer] = body.model.model.layers[layer].mlp = ours
        return body


def opened(backend: StandInBackend, world: World, held: Sequence[Sequence[int]]) -> RoutedSession:
    """A session that masks; `held` [L, P]."""
    layers = world.base.index.moe_layers
    resident: Resident = {layer: tuple(ids) for layer, ids in zip(layers, held, strict=True)}
    shape = world.shape([len(ids) for ids in held], 1)
    return backend.open_evaluate(world.base.artifact(shape), resident)


def everyone(world: World) -> list[list[int]]:
    """All experts, [L, E]."""
    index = world.base.index
    return [list(range(index.num_experts)) for _ in index.moe_layers]


def likeness(backend: StandInBackend, world: World, windows: NDArray[np.int64]) -> list[Floats]:
    """Cosine between the outputs of all experts of each layer on the tokens that it sees in `windows`, L of [E, E]."""
    session = opened(backend, world, everyone(world))
    blocks = blocks_of(session)
    for block in blocks:
        block.heard = []
    measure.text_loss(session, windows)
    found = []
    for block in blocks:
        assert block.heard is not None
        found.append(stand_in.similarity(block.outputs(torch.cat(block.heard))))
        block.heard = None
    return found


def cosine(alike: Sequence[Floats], held: Sequence[Sequence[int]]) -> float:
    """Mean cosine between an absent expert and the resident that is nearest to it."""
    nearest = [
        np.delete(each[:, list(ids)].max(1), list(ids))
        for each, ids in zip(alike, held, strict=True)
    ]
    return float(np.mean(np.concatenate(nearest)))


def blocks_of(session: RoutedSession) -> list[StandInBlock]:
    """The blocks of a session in the order of layers."""
    blocks = [session.body.blocks[layer] for layer in session.resident]
    return [block for block in blocks if isinstance(block, StandInBlock)]


def open_way(
    backend: StandInBackend,
    world: World,
    way: str,
    held: Sequence[Sequence[int]],
    alike: Sequence[Floats],
    value: Floats,
    stats: Stats,
) -> RoutedSession:
    """A session in which absent experts are dealt with in one of `WAYS`.

    Parameters
    ----------
    held : [L, P]
    alike : as of `likeness`
    value : [L, E], who gives way to a stand-in that needs a slot
    stats : the client's, of the whole base
    """
    if not way.startswith("merged"):
        session = opened(backend, world, held)
        if way != "masking":
            for block, ids, cosine in zip(blocks_of(session), held, alike, strict=True):
                block.slot = torch.from_numpy(stand_in.nearest(cosine, ids))
                block.first = way == "reroute"
        return session
    kept = [list(ids) for ids in held]
    if way == "merged-even":
        for ids, worth in zip(kept, value, strict=True):
            ids.remove(min(ids, key=lambda e: worth[e]))
    # Any absent expert keeps the place for the stand-in.
    places = [[*ids, next(e for e in range(value.shape[1]) if e not in ids)] for ids in kept]
    session = opened(backend, world, places)
    for position, (block, ids) in enumerate(zip(blocks_of(session), kept, strict=True)):
        used = stats["top"][position].astype(np.float64)
        loud = stats["output_norm"][position] / np.maximum(used, 1e-9)
        alpha = stand_in.merge_weights(used, np.asarray(loud, np.float64), ids)
        _merge_into(session.body, position, block, alpha)
    return session


def _merge_into(body: Body, position: int, block: StandInBlock, alpha: Floats) -> None:
    """Make the last slot of a block the stand-in, in 4 bits as its neighbours are."""
    pairs = [body.expert(position, e, worlds.EXPERTS) for e in range(len(alpha))]
    for weights, all_of_them in zip(block.frozen, zip(*pairs, strict=True), strict=True):
        mean = stand_in.merge(alpha, torch.stack(all_of_them).numpy())
        weights[-1] = torch.from_numpy(packing.dequantize(*packing.quantize(mean)))
    row, bias = stand_in.merge_router(alpha, block.router.numpy())
    block.rows[-1] = torch.from_numpy(row)
    block.bias = torch.zeros(len(block.ids))
    block.bias[-1] = bias


def states(session: RoutedSession, world: World, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Last hidden states [n, d] and log probabilities [n, V] where an answer's tokens are told."""
    hidden = []
    with torch.no_grad():
        for batch in evaluation_batches(world.prompts, rows):
            asked = torch.from_numpy(batch.weights).reshape(-1) > 0
            hidden.append(session.hidden(batch, PLAIN, train=False, statistics=False)[asked])
        every = torch.cat(hidden)
        return every, F.log_softmax(session.body.model.lm_head(every), -1)


def scores(
    session: RoutedSession,
    world: World,
    task: str,
    rows: Sequence[Row],
    full: tuple[Tensor, Tensor],
) -> dict[str, float]:
    """Answer loss and accuracy, and how far from the whole base: of hidden states relative to their norm, of answers
    as KL in nats."""
    found = measure.measure(session, world.prompts, world.tasks[task], rows, generate=False)
    hidden, log = states(session, world, rows)
    off = (hidden - full[0]).norm(dim=-1) / full[0].norm(dim=-1)
    kl = (full[1].exp() * (full[1] - log)).sum(-1)
    return {**found.scores, "hidden": float(off.mean()), "kl": float(kl.mean())}


def compare(
    backend: StandInBackend,
    world: World,
    shares: Sequence[float],
    windows: NDArray[np.int64],
    cache: Path,
) -> Iterator[Line]:
    """A line per client, share and way; share 1 is the whole base."""
    alike = likeness(backend, world, windows)
    full: dict[str, tuple[Tensor, Tensor]] = {}
    session = opened(backend, world, everyone(world))
    by_client = {
        c.name: (c.tasks[0], rows)
        for c in world.clients
        if (rows := world.rows(c, "held_back")[: world.suite.held_back])
    }
    for name, (task, rows) in by_client.items():
        full[name] = states(session, world, rows)
        found = scores(session, world, task, rows, full[name])
        yield {"seed": world.seed, "share": 1.0, "client": name, "way": "whole", **found}
    for share in shares:
        here = replace(world, budgets=dict.fromkeys(world.budgets, share))
        run = simulate.Run(here, methods.OURS, cache)
        chosen = run.choose(0, "evaluate")
        for name, (task, rows) in by_client.items():
            for way in WAYS:
                session = open_way(
                    *(backend, world, way, chosen[name], alike),
                    *(run.fleet.values[name], run.stats[name]),
                )
                found = scores(session, world, task, rows, full[name])
                yield {
                    **{"seed": world.seed, "share": share, "client": name, "way": way, **found},
                    "cosine": cosine(alike, chosen[name]),
                }


def table(lines: Sequence[Line]) -> list[str]:
    """Rows of the printed table."""
    seeds = sorted({line["seed"] for line in lines})

    def by_seed(share: float, way: str, measure: str) -> Floats:
        mine = [x for x in lines if x["share"] == share and x["way"] == way]
        return np.array([np.mean([x[measure] for x in mine if x["seed"] == s]) for s in seeds])

    rows = ["share  way          " + "".join(f"{name:>11}{'- masking':>26}" for name in MEASURES)]
    for share, way in dict.fromkeys((x["share"], x["way"]) for x in lines):
        row = f"{share:5.2f}  {way:12s}"
        for name in MEASURES:
            values = by_seed(share, way, name)
            row += f" {values.mean():11.4f}"
            if way in ("whole", "masking"):
                row += " " * 25
                continue
            paired = t_interval(values - by_seed(share, "masking", name))
            row += f" {paired.mean:+8.4f} ({paired.low:+.3f} {paired.high:+.3f})".ljust(25)
        rows.append(row.rstrip())
    for share in dict.fromkeys(x["share"] for x in lines if "cosine" in x):
        near = np.mean([x["cosine"] for x in lines if x["share"] == share and "cosine" in x])
        rows.append(f"{share:5.2f}  an absent expert and its nearest resident: cosine {near:.2f}")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--base", type=Path, default=REFERENCE, help="checkpoint directory")
    parser.add_argument("--work", type=Path, required=True, help="for the sliced base and lines")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.15, 0.25, 0.5])
    parser.add_argument("--seeds", type=numbers, default=(0, 1, 2))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        base = worlds.open_base(args.base, args.work / "base" / args.base.name)
        windows = tasks.heldout_text(args.data, base.tokenizer)
        windows = windows[:: len(windows) // WINDOWS]
        backend, lines = StandInBackend(), []
        cache = args.work / "cache" / base.index.base[:12]
        with open(args.work / "lines.jsonl", "w", encoding="utf-8") as file:
            for seed in args.seeds:
                world = worlds.make(SUITE, seed, base, args.data)
                for line in compare(backend, world, args.shares, windows, cache):
                    lines.append(line)
                    file.write(json.dumps(line) + "\n")
    except (tasks.TaskError, stand_in.StandInError) as error:
        print(f"benchmarks.stand_in: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

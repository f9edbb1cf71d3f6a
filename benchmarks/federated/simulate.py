"""One run: N clients of one method in one process, with the very code of devices and server.

Training and local objectives are `edge.trainer.work` over the fast torch backend; expert values, choice and aggregation
are `server`'s; bytes are those of the messages' own codecs. What is not run here is the network. The lines that it
yields are described in `benchmarks/federated/__init__.py`. Letters: L MoE layers, E experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.federated import baselines, measure, metrics, partitions, profiles, stacked
from benchmarks.federated.methods import Method
from benchmarks.federated.partitions import Client
from benchmarks.federated.revision import commit
from benchmarks.federated.world import World
from edge import feedback, kept, trainer
from edge.data import first_by_hash
from edge.routed_torch import RoutedBackend, RoutedSession
from edge.run import code
from edge.session import Resident, Terms
from export import costs
from protocol import names, tensors
from protocol.manifest import Shape, Slot
from protocol.objective import Objective
from server import (
    accept,
    adapters,
    coverage,
    expert_values,
    leases,
    scaffold,
    similarity,
    structure,
    threshold,
)
from server.aggregate import aggregate
from server.contribution import from_stats
from server.rounds import OpenRound, Work

Adapter = dict[str, NDArray[np.float32]]
Line = dict[str, Any]
Floats = NDArray[np.float64]
EVALUATE_EVERY = 5
MEASURED = 16  # held-back rows that a client looks at before and after its training
FORGETTING = "heldout"


def nothing() -> None:
    """A simulated client is never interrupted."""


@dataclass
class Fleet:
    """What the server knows, and what each client keeps, between rounds."""

    adapter: Adapter
    values: dict[str, Floats]
    trained: NDArray[np.float64]  # [L, E] tokens so far
    updates: NDArray[np.int64]  # [L, E] updates so far
    former: dict[str, list[list[int]]] = field(default_factory=dict)  # of those that had a lease
    blobs: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    kept: dict[str, Adapter] = field(default_factory=dict)  # by the device, see `edge.kept`
    control: scaffold.Control = scaffold.NOTHING
    structures: dict[str, structure.State] = field(default_factory=dict)
    activations: dict[str, Floats] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


class Run:
    """One method in one world."""

    def __init__(self, world: World, method: Method, cache: Path, device: str = "cpu") -> None:
        """`cache` keeps what is the same for all methods of a world; `device` is torch's name of one."""
        self.world, self.method = world, method
        self.base, self.index = world.base, world.base.index
        self.layers, self.experts = len(self.index.moe_layers), self.index.num_experts
        self.stacks = None
        self.backend = RoutedBackend(device)
        if method.rules.lora == "stack":
            self.stacks = stacked.Stacks(narrow=method.downlink == "float16")
            self.backend = stacked.DenseBackend(self.stacks.dense, device)
        self.own = baselines.BaselineBackend(method.trains) if method.trains != "experts" else None
        self.prior = np.asarray(self.index.routing_prior, np.float64)
        self.clients = {client.name: client for client in world.clients}
        self.stats = profiles.load_or_make(world, self.backend, cache) if method.profile else {}
        if method.relevance == "oracle":
            self.values = profiles.oracle(world, self.backend, cache)
        else:
            self.values = {name: self._values(s) for name, s in self.stats.items()}
        self.fleet = Fleet(
            adapter=self._fresh(),
            values={name: self.values.get(name, self.prior) for name in self.clients},
            trained=np.zeros((self.layers, self.experts)),
            updates=np.zeros((self.layers, self.experts), np.int64),
        )
        self.fleet.activations = {n: similarity.activation(s) for n, s in self.stats.items()}
        self.room = {name: self._room(name) for name in self.clients}
        self.shapes = {name: self._shape(name) for name in self.clients}
        self.prompts = {name: world.prompts_of(c) for name, c in self.clients.items()}
        self.rows = {name: world.rows(c, "train") for name, c in self.clients.items()}
        self.held_back = {
            name: first_by_hash(world.rows(c, "held_back"), world.suite.held_back)
            for name, c in self.clients.items()
        }
        self.terms = leases.Terms(
            run=world.suite.name,
            steps=world.suite.steps,
            learning_rate=method.learning_rate,
            router_learning_rate=method.learning_rate * method.router_factor,
            deadline=0.0,
            seed=world.seed,
            exploration=method.exploration,
            coverage=method.coverage,
            strategy="random" if method.holds == "random" else "coverage",
            uplink_bytes=0,
            gate_warmup=method.warmup,
            uplink=method.uplink,
            downlink=method.downlink,
        )

    # What a client can hold.

    def _fresh(self) -> Adapter:
        if self.method.trains != "experts":
            return baselines.fresh(self.method.trains, self.index)
        return adapters.fresh(self.index, self.method.rank)

    def _room(self, client: str) -> int:
        """Experts in all layers together whose predicted peak is within the client's budget."""
        count, budget = self.experts, self.world.budget_bytes(client)
        # Stacking gets as many experts as the other rules; that it needs more memory for them is in its lines.
        while count > self.index.top_k and self.predicted(self._even(count), False) > budget:
            count -= 1
        return count * self.layers

    def _shape(self, client: str) -> Shape:
        """What the client's program has room for under this method."""
        method, index = self.method, self.index
        if method.holds == "all":
            return self._even(self.experts)
        if method.holds == "dense":
            # The others' budgets are larger, but a model for everyone must fit the smallest device.
            return self._even(index.top_k)
        if method.holds == "theta":
            total = max(index.top_k * self.layers, int(self.room[client] * (1 - method.reserve)))
            p = np.maximum(self.fleet.values[client], 0)
            kept = threshold.widest(p, np.ones_like(p), total, top_k=index.top_k)
            return self.world.shape([len(ids) for ids in kept.experts], method.rank)
        return self._even(self.room[client] // self.layers)

    def _even(self, count: int) -> Shape:
        shape = self.world.shape([count] * self.layers, self.method.rank)
        if self.method.trains == "experts":
            return shape
        # Frozen but for one slot of rank 0 less: a shape has to train something, and its LoRA stays zero.
        slot = Slot(format=shape.slots[0][0].format, rank=1)
        return replace(shape, slots=tuple((slot,) * count for _ in shape.slots))

    def predicted(self, shape: Shape, changed: bool = True) -> int:
        """Peak bytes of training `shape` under this method; `changed`: with the dense change that stacking keeps."""
        base, method = self.base, self.method
        if method.trains != "experts":
            slots = sum(len(x) for x in shape.slots)
            lora_bytes = slots * (
                costs.slot_memory(self.index, shape.slots[0][0])
                - costs.frozen_bytes(self.index, shape.slots[0][0].format)
            )
            own = 16 * baselines.trained_floats(method.trains, self.index)
            return base.predicted_bytes(shape) - lora_bytes + own
        total = base.predicted_bytes(shape)
        if method.objective.scaffold:  # the server's and the client's own control variates
            total += 2 * 4 * costs.parameter_floats(self.index, shape)
        if changed and self.stacks is not None:
            weights = sum(math.prod(self.index.features(p)) for p in self.index.projections)
            total += stacked.CHANGE_BYTES * weights * sum(len(x) for x in shape.slots)
        return total

    def _values(self, stats: Mapping[str, NDArray[np.float32]]) -> Floats:
        return expert_values.values(stats, self.method.beta, relevance=self.method.relevance)

    # Rounds.

    def choose(self, round: int, work: Work = "train") -> dict[str, list[list[int]]]:
        """Experts of every client, whether it takes part or not, as the server chooses them."""
        method, fleet = self.method, self.fleet
        chosen = leases.select(
            OpenRound(round=round, work=work, devices=tuple(self.clients)),
            self.shapes,
            {} if method.holds in ("prior", "dense", "all") else fleet.values,
            fleet.updates,
            None,
            fleet.former if method.structure == "none" else {},
            self.index,
            self.terms,
        )
        for name, state in fleet.structures.items():
            chosen[name] = [list(ids) for ids in state.held]
        return chosen

    def objective(self, client: str, round: int) -> Objective:
        """The local objective of a lease."""
        objective = self.method.rules.objective(self.method.objective, round)
        if objective.cap_where == "backward" and objective.cap:
            objective = replace(objective, cap=self.world.slots_each(client))
        below = self.method.active_below
        if below and self.world.budgets[client] >= below:
            objective = replace(objective, active=0)
        return objective

    def resident(self, chosen: list[list[int]]) -> Resident:
        """As a session wants it."""
        return {layer: tuple(ids) for layer, ids in zip(self.index.moe_layers, chosen, strict=True)}

    def trains(self, resident: Resident) -> Resident:
        """What is trained: the residents, or a baseline's own parts."""
        if self.method.trains == "adapters":
            return {layer: tuple(range(baselines.ADAPTERS)) for layer in resident}
        if self.method.trains == "probe":
            first = self.index.moe_layers[0]
            return {layer: (0,) if layer == first else () for layer in resident}
        return resident

    def slice(self, client: str, resident: Resident) -> Adapter:
        """What a lease has of the adapter, before it is rounded for its way down."""
        if self.method.trains != "experts":
            return dict(self.fleet.adapter)
        held = {str(layer): ids for layer, ids in resident.items()}
        ranks = adapters.ranks(held, self.shapes[client], self.index)
        return adapters.part_for(self.fleet.adapter, ranks, self.index)

    def delivered(self, part: Adapter) -> Adapter:
        """The same as a device has it."""
        if self.method.downlink == "float16":
            return tensors.widened(tensors.narrowed(part))
        return part

    def downloaded(self, client: str, resident: Resident, part: Adapter) -> int:
        """Bytes of a lease: its adapter (or stacks, see `stacked.Stacks.sent`), and experts new to the client."""
        wanted = {(layer, e) for layer, ids in resident.items() for e in ids}
        changes = 0
        if self.stacks is not None:
            part, changes = stacked.without_factors(part), self.stacks.sent(client, wanted)
        wide = np.float16 if self.method.downlink == "float16" else np.float32
        size = changes + len(tensors.encode({n: v.astype(wide) for n, v in part.items()}))
        had = self.fleet.blobs.setdefault(client, set())
        first = not had
        new = wanted - had
        had |= wanted
        blob = costs.frozen_bytes(self.index, "int4")
        # The first experts come with the artifact, whatever the method.
        return size + (0 if first else len(new) * blob)

    def uploaded(self, client: str, leased: Adapter, result: trainer.Result) -> tuple[Adapter, int]:
        """What the server gets of an update, control variates among it, and its bytes; notes what the device keeps."""
        own = self.fleet.kept.get(client, {})
        coded, owed = code(result, self.delivered(leased), own, self.method.uplink)
        if new := {**result.kept, **owed}:
            replaced = (feedback.RESIDUAL, feedback.BASIS)
            self.fleet.kept[client] = kept.merged(own, new, replaced)
        wanted = {n: v.shape for n, v in {**result.adapter, **result.control}.items()}
        ways = self.method.uplink, self.method.downlink
        sent = accept.arrived(coded, wanted, leased, *ways)
        stats = {f"stats.{n}": v for n, v in result.stats.items()}
        return sent, len(tensors.encode({**coded, **stats}))

    def draw(self, round: int) -> tuple[dict[str, trainer.Job], list[str]]:
        """Client -> what a round asks of it, and who of them never delivers."""
        suite, terms = self.world.suite, self.terms
        rng = np.random.default_rng([suite.number, self.world.seed, round])
        drawn = partitions.sample_round(rng, self.world.clients, suite.setting, suite.per_round)
        seeds = {name: int(rng.integers(2**31)) for name in drawn}
        chosen, jobs = self.choose(round), {}
        for name in drawn:
            resident = self.resident(chosen[name])
            jobs[name] = trainer.Job(
                work="train",
                resident=resident,
                trained=self.trains(resident),
                steps=terms.steps,
                learning_rate=terms.learning_rate,
                router_learning_rate=(
                    terms.router_learning_rate if round > terms.gate_warmup else 0.0
                ),
                seed=seeds[name],
                objective=self.objective(name, round),
            )
        return jobs, partitions.failures(rng, drawn, suite.failures)

    def train_round(self, round: int, jobs: Mapping[str, trainer.Job] | None = None) -> Line:
        """One round; returns its line.

        Parameters
        ----------
        jobs : client -> what it is asked to do, in place of what `draw` finds; so the rounds of a real server are
            played again
        """
        world, method, fleet = self.world, self.method, self.fleet
        failed: list[str] = []
        if jobs is None:
            jobs, failed = self.draw(round)
        drawn = list(jobs)
        contributions, losses, seconds, missed = [], [], {}, []
        moved: dict[str, Adapter] = {}
        results: dict[str, trainer.Result] = {}
        up = down = parameters = 0
        counts = fleet.updates.astype(np.float32)  # as they are when the round opens
        for name, job in jobs.items():
            fleet.former[name] = [list(ids) for ids in job.resident.values()]
            leased = self.slice(name, job.resident)
            shared = scaffold.part_for(fleet.control, leased) if job.objective.scaffold else {}
            if job.objective.target_balance:
                shared["trained_counts"] = counts
            down += self.downloaded(name, job.resident, {**leased, **shared})
            seconds[name] = profiles.device_seconds(world, name, self.shapes[name], job.steps)
            if name in failed:
                continue
            result = self.train(name, job, self.delivered(leased), self.delivered(shared))
            results[name] = result
            sent, size = self.uploaded(name, leased, result)
            up += size
            control = [n for n in sent if n.startswith(names.SCAFFOLD)]
            if control:
                moved[name] = {n.removeprefix(names.SCAFFOLD): sent.pop(n) for n in control}
            parameters += sum(value.size for value in sent.values())
            contributions.append(
                from_stats(
                    name,
                    sent,
                    result.stats,
                    self.index.moe_layers,
                    top_k=self.index.top_k,
                    rows=len(self.rows[name]),
                    blend=method.rules.gate_blend,
                )
            )
            losses.append(result.losses)
            missed.append(float(np.mean(result.missed_mass)))
            got = np.asarray(result.stats["trained_tokens"], np.float64)
            fleet.trained += got
            fleet.updates += got > 0
        self._learn(results)
        line: Line = {
            "kind": "round",
            "round": round,
            "clients": drawn,
            "failed": failed,
            "bytes_up": up,
            "bytes_down": down,
            "parameters_up": parameters,
            "device_seconds": seconds,
            "loss_first": float(np.mean([x[0] for x in losses])) if losses else None,
            "loss_last": float(np.mean([x[1] for x in losses])) if losses else None,
            "trained_experts": len({k for c in contributions for k in c.trained_tokens}),
            "never_trained": coverage.never_trained(fleet.trained),
            "coverage_cv": coverage.coverage_cv(fleet.trained),
            "missed_mass": float(np.mean(missed)) if missed else 0.0,
        }
        if contributions:
            projections = self.index.projections if method.trains == "experts" else ("adapter",)
            folded = aggregate(fleet.adapter, contributions, projections, method.rules)
            fleet.adapter = folded.adapter
            if self.stacks is not None:
                fleet.adapter = self.stacks.absorb(
                    folded, projections, rank=method.rank, round=round
                )
            if moved:
                shapes = {n: v.shape for n, v in folded.adapter.items()}
                fleet.control = scaffold.advance(fleet.control, moved, shapes)
            consistency = list(folded.consistency.values())
            bias = list(folded.bias.values())
            line |= {
                "tail_mean": folded.tail_mean,
                "routing_consistency": float(np.mean(consistency)) if consistency else None,
                "factor_bias": float(np.mean(bias)) if bias else None,
                "gate_drift": float(np.mean(list(folded.gate_drift.values()) or [0.0])),
                "structure": fleet.changes,
            }
            fleet.changes = []
        return line

    def train(self, name: str, job: trainer.Job, part: Adapter, shared: Adapter) -> trainer.Result:
        """The device's side of a lease."""
        backend: Any = self.backend
        if self.own is not None:
            backend, self.own.frozen = self.own, job.resident
            job = replace(job, resident=job.trained)
        return trainer.work(
            backend,
            self.base.artifact(self.shapes[name]),
            part,
            job,
            self.prompts[name],
            self.rows[name],
            self.held_back[name][:MEASURED],
            nothing,
            shared,
            self.fleet.kept.get(name),
        )

    def _learn(self, results: Mapping[str, trainer.Result]) -> None:
        """What came with updates changes what the server thinks of experts, and stage 2 the clients' structures."""
        method, fleet = self.method, self.fleet
        if method.trains != "experts" or method.relevance == "oracle":
            return
        for name, result in results.items():
            if method.profile:
                stats = dict(result.stats)
                if method.relevance == "labels":  # measured once, over the whole model
                    stats["label_information"] = self.stats[name]["label_information"]
                fresh = self._values(stats)
                fleet.values[name] = expert_values.smooth(fleet.values[name], fresh)
            fleet.activations[name] = similarity.activation(result.stats)
        if method.structure != "none":
            peers = {
                name: structure.Peer(
                    activation=matrix, experts=sum(len(slots) for slots in self.shapes[name].slots)
                )
                for name, matrix in fleet.activations.items()
            }
            for name, result in results.items():
                self._adjust(name, result, {n: peer for n, peer in peers.items() if n != name})

    def _adjust(
        self, name: str, result: trainer.Result, peers: Mapping[str, structure.Peer]
    ) -> None:
        """FedMoE's stage 2 after a turn of one client: its experts, and with them the shape of its program."""
        fleet, layers = self.fleet, self.layers
        top_k, experts = self.index.top_k, self.experts
        state = fleet.structures.get(name)
        if state is None:
            held = tuple(tuple(sorted(ids)) for ids in fleet.former[name])
            state = structure.State(held=held)
        accuracy = result.after[1]
        report = structure.Report(
            score=accuracy if accuracy >= 0 else -result.after[0],
            activation=fleet.activations[name],
        )
        limits = structure.Limits(
            least=(top_k,) * layers, most=(experts,) * layers, total=self.room[name]
        )
        mode = "freeze" if self.method.structure == "freeze" else "retry"
        rules = structure.Rules(mode=mode, patience=1, trial=1)  # type: ignore[arg-type]
        state, change = structure.step(state, report, peers, limits, rules)
        fleet.structures[name] = state
        if change.kind != "none":
            fleet.changes.append(
                f"{name} {change.kind} +{len(change.added)} -{len(change.removed)}"
            )
        self.shapes[name] = self.world.shape([len(ids) for ids in state.held], self.method.rank)

    # Scores.

    def session(self, shape: Shape, resident: Resident, adapter: Adapter) -> RoutedSession:
        """An evaluation session with an adapter in it."""
        artifact = self.base.artifact(shape)
        if self.own is not None:
            self.own.frozen = resident
            session: Any = self.own.open_evaluate(artifact, resident)
        else:
            session = self.backend.open_evaluate(artifact, resident)
        session.load(adapter)
        return session

    def global_scores(self, round: int, split: str, *, generate: bool) -> Iterator[Line]:
        """All experts with the global adapter, on rows that no client has."""
        everyone = self.resident([list(range(self.experts))] * self.layers)
        shape = self._even(self.experts)
        session = self.session(shape, everyone, self.fleet.adapter)
        prompts = self.world.prompts
        for name, task in self.world.tasks.items():
            rows = task.test if split == "test" else task.validation
            found = measure.measure(session, prompts, task, rows, generate=generate)
            for metric, value in found.scores.items():
                line: Line = {
                    "kind": "score",
                    "round": round,
                    "scope": "global",
                    "split": split,
                    "task": name,
                    "metric": metric,
                    "value": value,
                    "rows": found.rows,
                }
                if metric == "accuracy" and found.right is not None:
                    line["per_row"] = metrics.packed(found.right)
                yield line

    def forgetting(self, round: int, windows: NDArray[np.int64]) -> Line:
        """Loss of the global model on text like that of pretraining."""
        everyone = self.resident([list(range(self.experts))] * self.layers)
        session = self.session(self._even(self.experts), everyone, self.fleet.adapter)
        return {
            "kind": "score",
            "round": round,
            "scope": "global",
            "split": "test",
            "task": FORGETTING,
            "metric": "lm_loss",
            "value": measure.text_loss(session, windows),
            "rows": len(windows),
        }

    def last_leases(self) -> int:
        """Bytes of the last round's leases, in which every client gets what it is measured with."""
        chosen = self.choose(self.world.suite.rounds, "evaluate")
        residents = {name: self.resident(ids) for name, ids in chosen.items()}
        return sum(
            self.downloaded(name, resident, self.slice(name, resident))
            for name, resident in residents.items()
        )

    def profile_bytes(self) -> int:
        """Bytes of the experts that all clients stream once to profile the full model, where the method does so."""
        blob = costs.frozen_bytes(self.index, "int4")
        experts = self.layers * self.experts if self.method.profile else 0
        return len(self.clients) * experts * blob

    def device_scores(self, round: int, *, generate: bool) -> Iterator[Line]:
        """Every client's own sub-MoE on its own held-back rows: what the owner of the device gets."""
        chosen = self.choose(round, "evaluate")
        for name in self.clients:
            resident = self.resident(chosen[name])
            part = trainer.with_kept(
                self.delivered(self.slice(name, resident)),
                self.fleet.kept.get(name, {}),
                self.objective(name, round),
            )
            session = self.session(self.shapes[name], resident, part)
            terms = Terms(active=self.objective(name, round).active)
            by_task = self._by_task(self.clients[name])
            for task, rows in by_task.items():
                found = measure.measure(
                    session,
                    self.world.prompts,
                    self.world.tasks[task],
                    rows,
                    terms,
                    bias=trainer.label_bias(
                        self.prompts[name],
                        self.rows[name],
                        self.method.objective.label_prior,
                        self.index.vocabulary,
                    ),
                    generate=generate,
                )
                for metric, value in found.scores.items():
                    yield {
                        "kind": "score",
                        "round": round,
                        "scope": "device",
                        "client": name,
                        "split": "held_back",
                        "task": task,
                        "metric": metric,
                        "value": value,
                        "rows": found.rows,
                    }

    def _by_task(self, client: Client) -> dict[str, list[Any]]:
        each = self.world.suite.held_back // len(client.tasks)
        return {
            task: first_by_hash([self.world.tasks[task].train[i] for i in indices], each)
            for task, indices in client.held_back.items()
        }

    def first_line(self) -> Line:
        """The run's description."""
        world, method = self.world, self.method
        return {
            "kind": "run",
            "suite": world.suite.name,
            "method": method.name,
            "seed": world.seed,
            "profile_bytes": self.profile_bytes(),
            "settings": {
                "commit": commit(),
                "method": asdict(method),
                "suite": asdict(world.suite),
            },
            "clients": {
                name: {
                    "tasks": list(client.tasks),
                    "rows": len(self.rows[name]),
                    "budget": world.budgets[name],
                    "experts": sum(len(slots) for slots in self.shapes[name].slots),
                    "predicted_bytes": self.predicted(self.shapes[name]),
                    "budget_bytes": world.budget_bytes(name),
                }
                for name, client in self.clients.items()
            },
        }


def run(
    world: World,
    method: Method,
    cache: Path,
    heldout: NDArray[np.int64],
    *,
    tuning: bool = False,
    device: str = "cpu",
) -> Iterator[Line]:
    """All lines of one run, as they come. With `tuning`, validation rows only and no curves.

    `device` computes the methods that train experts; the two that do not stay on the CPU.
    """
    started = time.monotonic()
    going = Run(world, method, cache, device)
    yield going.first_line()
    last = world.suite.rounds
    if not tuning:
        yield from going.global_scores(0, "validation", generate=False)
        yield from going.global_scores(0, "test", generate=True)
        yield from going.device_scores(0, generate=False)
        yield going.forgetting(0, heldout)
    for round in range(1, last + 1):
        yield going.train_round(round)
        if round == last or (round % EVALUATE_EVERY == 0 and not tuning):
            yield from going.global_scores(round, "validation", generate=False)
        if round == last or (round % (2 * EVALUATE_EVERY) == 0 and not tuning):
            yield from going.device_scores(round, generate=round == last and not tuning)
    if not tuning:
        yield from going.global_scores(last, "test", generate=True)
        yield going.forgetting(last, heldout)
    yield {
        "kind": "end",
        "seconds": time.monotonic() - started,
        "bytes_down": going.last_leases(),
    }

"""What is the same for every method of a world and dear to find out: clients' statistics, the oracle, device times."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import device_profiles
from benchmarks.federated import measure
from benchmarks.federated.world import World
from edge import trainer
from edge.data import by_label, first_by_hash
from edge.routed_torch import RoutedBackend, RoutedSession
from edge.statistics import LabelCounts, RoutingSums
from export import work
from protocol.manifest import Shape
from server import expert_values

Stats = dict[str, NDArray[np.float32]]
ROWS = 32
ORACLE_ROWS = 16
KINDS = ("phone_4gb", "pixel_8", "galaxy_s24", "raspberry_pi_5", "jetson_orin_nano", "jetson_orin")


def _cached(
    path: Path, make: Callable[[], dict[str, NDArray[np.float64]]]
) -> Mapping[str, NDArray[np.float64]]:
    """Arrays by name; made once per file, whole or not at all."""
    if path.is_file():
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    np.savez(partial, **made)  # type: ignore[arg-type]
    os.replace(partial, path)
    return made


def _whole(world: World, backend: RoutedBackend) -> RoutedSession:
    """The base with all of its experts."""
    index = world.base.index
    everyone = {layer: tuple(range(index.num_experts)) for layer in index.moe_layers}
    shape = world.shape([index.num_experts] * len(index.moe_layers), 4)
    return backend.open_evaluate(world.base.artifact(shape), everyone)


def load_or_make(world: World, backend: RoutedBackend, cache: Path) -> dict[str, Stats]:
    """Statistics of the full model over rows of each client: exactly what `edge.profiling` finds on a device."""

    def make() -> dict[str, NDArray[np.float64]]:
        index, session = world.base.index, _whole(world, backend)
        flat = {}
        for client in world.clients:
            rows = first_by_hash(world.rows(client, "train"), ROWS)
            prompts = world.prompts_of(client)
            known = 0 if prompts.verbaliser is None else len(prompts.verbaliser.labels)
            sums = RoutingSums(index.moe_layers, index.num_experts, session.resident)
            counts = LabelCounts(index.moe_layers, index.num_experts, known)
            batches = by_label(prompts, rows)
            nobody = lambda: None  # noqa: E731
            trainer.evaluate(session, session.parameters(), batches, None, nobody, sums, counts)
            arrays = {**sums.arrays(), "label_information": counts.information()}
            flat |= {f"{client.name}/{n}": np.asarray(v) for n, v in arrays.items()}
        return flat

    suite = world.suite
    path = cache / f"profile-{suite.number}-{world.seed}-{suite.batch}x{suite.sequence}.npz"
    found: dict[str, Stats] = {}
    for key, value in _cached(path, make).items():
        client, _, name = key.partition("/")
        found.setdefault(client, {})[name] = np.asarray(value, np.float32)
    return found


def oracle(world: World, backend: RoutedBackend, cache: Path) -> dict[str, NDArray[np.float64]]:
    """Leave-one-out: how much the answer loss of a client's rows grows without each expert, [L, E] in shares."""

    def make() -> dict[str, NDArray[np.float64]]:
        index, session = world.base.index, _whole(world, backend)
        found = {}
        for client in world.clients:
            rows = first_by_hash(world.rows(client, "train"), ORACLE_ROWS)
            task = world.tasks[client.tasks[0]]

            def loss(rows: list = rows, task: object = task) -> float:
                return measure.measure(session, world.prompts, task, rows, generate=False).scores[
                    "answer_loss"
                ]

            full = loss()
            without = np.zeros((len(index.moe_layers), index.num_experts))
            for position, layer in enumerate(index.moe_layers):
                for expert in range(index.num_experts):
                    session.body.blocks[layer].closed = expert
                    without[position, expert] = loss()
                session.body.blocks[layer].closed = None
            found[client.name] = expert_values.oracle_values(without, full)
        return found

    return dict(_cached(cache / f"oracle-{world.suite.number}-{world.seed}.npz", make))


def device_seconds(world: World, client: str, shape: Shape, steps: int) -> float:
    """Seconds that training takes a device of the client's kind, by its profile's throughput: a model, not measured."""
    number = [c.name for c in world.clients].index(client)
    profile = device_profiles.load(KINDS[number % len(KINDS)])
    base = world.base
    fixed = work.fixed_work(base.index, base.dense, shape).total
    slots = [slot for layer in shape.slots for slot in layer]
    tokens = shape.batch * shape.sequence * base.index.top_k / max(1, len(slots))
    each = sum(
        work.unpacking(base.index, slot) + work.adapter_work(base.index, slot) * tokens
        for slot in slots
    )
    return steps * (fixed + each) / (profile.gflops * 1e9 * work.EFFICIENCY)

"""What a run is about, whatever the method: the sliced base, the tasks' rows, the clients and what each can hold.

Letters: L MoE layers, E experts, P slots of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.federated import partitions, tasks
from benchmarks.federated.partitions import Client
from benchmarks.federated.suites import Suite
from benchmarks.federated.tasks import TaskData
from edge import data
from edge.data import Prompter, Row
from edge.session import Artifact
from export import costs, families
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint
from export.slice_base import slice_base
from protocol import PROTOCOL_VERSION
from protocol.manifest import BaseIndex, Manifest, MemoryPlan, Program, Shape, Slot
from protocol.messages import Task

DENSE = "int8"
EXPERTS = "int4"


class CachedTokenizer:
    """Remembers what it has encoded: every row is asked for many times."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.encode = functools.lru_cache(maxsize=None)(inner.encode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True)
class Base:
    """A sliced checkpoint and its tokenizer."""

    index: BaseIndex
    blobs: Path
    tokenizer: Any
    dense: costs.Dense

    def artifact(self, shape: Shape) -> Artifact:
        """What a device of this shape would hold; without programs, as torch needs none."""
        nothing = Program(
            blob=self.index.tokenizer,
            method="forward",
            inputs=(),
            parameters=(),
            outputs=("loss",),
            arena_bytes=0,
        )
        zero = MemoryPlan(
            budget=0, arena=0, inputs=0, parameters=0, optimizer=0, outputs=0, runtime=0
        )
        manifest = Manifest(
            protocol=PROTOCOL_VERSION,
            base=self.index.base,
            profile="simulated",
            shape=shape,
            train=nothing,
            evaluate=nothing,
            dense=self.index.dense[shape.dense],
            tokenizer=self.index.tokenizer,
            memory=zero,
            experts={},
        )
        return Artifact(self.index, manifest, self.blobs)

    def predicted_bytes(self, shape: Shape) -> int:
        """Peak bytes that the planner predicts for training a shape."""
        return costs.estimate(self.index, self.dense, shape, 0).predicted


def open_base(checkpoint: Path, store: Path) -> Base:
    """Slice a checkpoint into `store`, or find it there."""
    opened = Checkpoint(checkpoint)
    family = families.of(opened.config, str(checkpoint))
    index = slice_base(
        opened, family, BlobStore(store), lambda stage: None, tuple({DENSE, EXPERTS})
    )
    tokenizer: Any = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Base(index, store / "blobs", CachedTokenizer(tokenizer), costs.dense_of(index))


@dataclass(frozen=True)
class World:
    """One suite with one seed; the same for every method."""

    suite: Suite
    seed: int
    base: Base
    tasks: Mapping[str, TaskData]
    clients: tuple[Client, ...]
    budgets: Mapping[str, float]  # client -> share of all experts
    prompts: Prompter

    def rows(self, client: Client, part: str) -> list[Row]:
        """Rows of a client's "train" or "held_back" part, its tasks mixed evenly."""
        columns = []
        for task, indices in sorted(getattr(client, part).items()):
            columns.append([self.tasks[task].train[i] for i in indices])
        longest = max((len(column) for column in columns), default=0)
        return [column[i] for i in range(longest) for column in columns if i < len(column)]

    def prompts_of(self, client: Client) -> Prompter:
        """A client's own prompter: where it has one task, and that has labels, it knows them."""
        labels = self.tasks[client.tasks[0]].labels if len(client.tasks) == 1 else ()
        if not labels or self.prompts.verbaliser is not None:
            return self.prompts
        known = data.verbalise(labels, self.base.tokenizer, self.suite.answers)
        return replace(self.prompts, verbaliser=known)

    def slots_each(self, client: str) -> int:
        """Slots of a layer that the client's budget has room for; at least the base's k."""
        index = self.base.index
        return max(index.top_k, round(self.budgets[client] * index.num_experts))

    def shape(self, per_layer: Sequence[int], rank: int) -> Shape:
        """The shape of a program with so many trained int4 slots in each layer."""
        slot = Slot(format=EXPERTS, rank=rank)
        return Shape(
            batch=self.suite.batch,
            sequence=self.suite.sequence,
            answers=self.suite.answers,
            dense=DENSE,
            slots=tuple((slot,) * n for n in per_layer),
        )

    def budget_bytes(self, client: str) -> int:
        """The client's memory: what a plain sub-MoE of its share of experts takes, rank 4."""
        layers = len(self.base.index.moe_layers)
        return self.base.predicted_bytes(self.shape([self.slots_each(client)] * layers, 4))


def make(suite: Suite, seed: int, base: Base, folder: Path) -> World:
    """Read the tasks and divide their rows; `folder` is the data folder. Raises `tasks.TaskError`."""
    found = {
        name: tasks.load(
            folder,
            name,
            base.tokenizer,
            sequence=suite.sequence,
            answers=suite.answers,
            validation=suite.validation,
            test=suite.test,
        )
        for name in suite.tasks
    }
    rng = np.random.default_rng([suite.number, seed])
    groups = {name: task.groups for name, task in found.items()}
    if suite.setting in partitions.SETTINGS:
        clients = partitions.fedmoe(
            groups, suite.setting, rng, clients=suite.clients, rows_each=suite.rows_each
        )
    elif len(found) == 1:
        name = next(iter(found))
        clients = partitions.one_task(
            name,
            groups[name],
            suite.clients,
            rng,
            alpha=suite.alpha,
            rows_each=suite.rows_each,
        )
    else:
        clients = partitions.task_skew(groups, suite.clients, rng, rows_each=suite.rows_each)
    if suite.budget is not None:
        budgets = {client.name: suite.budget for client in clients}
    else:
        budgets = partitions.budgets(clients, rng)
    labels = next(iter(found.values())).labels if len(found) == 1 else ()
    task = Task(template="{text}", labels=labels) if labels else tasks.TASK
    prompts = data.prompter(
        base.tokenizer, task, suite.batch, suite.sequence, suite.answers, base.index
    )
    return World(suite, seed, base, found, tuple(clients), budgets, prompts)

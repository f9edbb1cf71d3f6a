"""A world of a few clients over the tiny base: one task with three labels."""

import random

import numpy as np

from benchmarks.federated.partitions import Client
from benchmarks.federated.suites import Suite
from benchmarks.federated.tasks import TaskData
from benchmarks.federated.world import Base, World
from edge import data
from edge.data import Row
from export import costs
from protocol.messages import Task

WORDS = {
    "sport": "the team won match after late goal by captain",
    "science": "the laboratory measured spectrum of distant galaxy",
    "finance": "the bank raised its rate and shares fell on market",
}
TASK = Task(labels=tuple(sorted(WORDS)))
SUITE = Suite(
    name="tiny", number=99, tasks=("topics",), clients=3, rounds=2, per_round=2, steps=2,
    batch=4, sequence=32, answers=2, held_back=16, validation=6, test=6,
)  # fmt: skip


def rows(seed, count=40):
    """Texts of five words and their label."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        label = rng.choice(sorted(WORDS))
        text = " ".join(rng.sample(WORDS[label].split(), 5)) + f" {seed}.{i}"
        found.append(Row(text, label))
    return found


def base_of(artifact, tokenizer):
    """The tiny base as a world has it."""
    return Base(artifact.base, artifact.blobs, tokenizer, costs.dense_of(artifact.base))


def world_of(base, rows_of, suite=SUITE):
    """Clients with the given rows, divided into training and held-back rows as a device divides them."""
    every, clients = [], []
    for name, found in rows_of.items():
        train, held_back = data.split_rows(found)
        every += train + held_back
        ends = np.arange(len(every) - len(found), len(every))
        parts = {"topics": ends[: len(train)]}, {"topics": ends[len(train) :]}
        clients.append(Client(name=name, train=parts[0], held_back=parts[1]))
    task = TaskData(
        name="topics", metric="accuracy", labels=TASK.labels, train=tuple(every),
        groups=tuple(str(row.label) for row in every), validation=tuple(rows(90, 6)), test=tuple(rows(91, 6)),
    )  # fmt: skip
    prompts = data.prompter(
        base.tokenizer, TASK, suite.batch, suite.sequence, suite.answers, base.index
    )
    budgets = dict.fromkeys(rows_of, 0.5)
    return World(suite, 0, base, {"topics": task}, tuple(clients), budgets, prompts)

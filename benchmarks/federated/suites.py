"""What is compared under which conditions. A suite fixes the tasks, the clients and the work; a method does not."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One setting.

    Attributes
    ----------
    number : seeds what is random in it
    setting : "labels" (one task, Dirichlet `alpha` over its labels, None: IID), one of FedMoE's four
        (`partitions.SETTINGS`), or "tasks" (instruction tasks, one or two per client)
    budget : share of all experts that each client can hold; None: from 15 to 50 %
    rounds, per_round, steps : training rounds, clients drawn in each, optimiser steps of a client in a round
    batch, sequence, answers : B, S and K of the programs
    rows_each : rows of a client; None: all that there are
    held_back : most held-back rows of a client that are measured
    validation, test : rows of each task for the global model
    failures : share of drawn clients that never deliver
    """

    name: str
    number: int
    tasks: tuple[str, ...]
    setting: str = "labels"
    alpha: float | None = None
    budget: float | None = None
    clients: int = 30
    rounds: int = 15
    per_round: int = 5
    steps: int = 5
    batch: int = 16
    sequence: int = 32
    answers: int = 2
    rows_each: int | None = 200
    held_back: int = 32
    validation: int = 320
    test: int = 1000
    failures: float = 0.0


_NEWS = Suite(name="agnews-0.1", number=1, tasks=("agnews",), alpha=0.1)
_THREE = Suite(
    name="fedmoe-standard-t",
    number=10,
    tasks=("agnews", "squad", "xsum"),
    setting="standard-t",
    batch=8,
    sequence=64,
    answers=12,
    rows_each=None,
    validation=100,
    test=300,
)
_ALL = (
    _NEWS,
    replace(_NEWS, name="agnews-0.5", number=2, alpha=0.5),
    replace(_NEWS, name="agnews-iid", number=3, alpha=None),
    replace(_NEWS, name="selection-15", number=4, budget=0.15),
    replace(_NEWS, name="selection-25", number=5, budget=0.25),
    replace(_NEWS, name="selection-50", number=6, budget=0.5),
    replace(_NEWS, name="stragglers", number=7, failures=0.3),
    replace(_NEWS, name="ablation-agnews-0.1"),
    replace(_NEWS, name="uplink-agnews-0.1"),
    _THREE,
    replace(_THREE, name="fedmoe-standard-td", number=11, setting="standard-td"),
    replace(_THREE, name="fedmoe-enforced-t", number=12, setting="enforced-t"),
    replace(_THREE, name="fedmoe-enforced-td", number=13, setting="enforced-td"),
    replace(
        _THREE,
        name="instructions",
        number=20,
        tasks=(
            "commonsenseqa_answer_generation",
            "sentiment140_classification",
            "emotion_classification",
            "sciq_answer_generation",
            "outcome_extraction",
            "glucose_reverse_cause_event_detection",
        ),
        setting="tasks",
        test=100,
    ),
)
SUITES = {suite.name: suite for suite in _ALL}

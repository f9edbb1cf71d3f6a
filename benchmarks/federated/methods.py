"""The methods that are compared, each as one frozen value over the same machinery.

Their settings are those of `server.presets`; what is said here is the scoreboard's own.
What a method may hold in memory is the client's budget, the same for all; `over_budget` marks those that need more and
are shown for reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from protocol.objective import Objective
from server.presets import PRESETS
from server.rules import Rules

Holds = Literal["value", "theta", "random", "prior", "dense", "all"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How experts are chosen, trained, sent and combined.

    Attributes
    ----------
    trains : LoRA on the held experts; adapter experts beside frozen ones (FFT-MoE); or a low-rank linear probe on the
        output layer
    holds : which experts. "value": the most valuable in every layer, less `coverage`; "theta": FedMoE's threshold, more
        in one layer than in another; "random": drawn once per client; "prior": those that the base itself uses most,
        the same for all of a budget; "dense": as many as a token uses, the same for all; "all": everything
    relevance, beta, exploration, coverage : of the value, see `server.expert_values` and `server.choose_experts`
    profile : stage 1: values come from the client's own statistics; without, from the base's prior
    structure : stage 2: FedMoE's structural adjustment
    reserve : share of the budget that is kept free for growth (FedMoE's 1 - alpha)
    active_below : the objective's `active` is for clients with less than this share of the experts; 0: for all
    learning_rate, router_factor, warmup : of the factors; of the router rows, as a share of it; rounds in which these
        rows stay frozen
    tuned_as : the method whose tuned learning rate it takes; empty: its own
    """

    name: str
    trains: Literal["experts", "adapters", "probe"] = "experts"
    holds: Holds = "value"
    relevance: str = "norm"
    beta: float = 0.1
    exploration: float = 0.0
    coverage: float = 0.0
    profile: bool = True
    structure: Literal["none", "freeze", "retry"] = "none"
    reserve: float = 0.0
    rules: Rules = Rules()
    objective: Objective = Objective()
    active_below: float = 0.0
    uplink: Literal["float32", "int8", "int4"] = "float32"
    downlink: Literal["float32", "float16"] = "float32"
    learning_rate: float = 0.01
    router_factor: float = 0.3
    warmup: int = 0
    rank: int = 4
    over_budget: bool = False
    tuned_as: str = ""


_HOLDS: dict[str, Holds] = {
    "coverage": "value",
    "value": "value",
    "prior": "prior",
    "random": "random",
}


def _as(name: str, preset: str = "", **own: Any) -> Method:
    """A preset of the server, of the same name if not said otherwise, and what is the scoreboard's own."""
    found = PRESETS[preset or name]
    shared = {
        "holds": _HOLDS[found.strategy],
        "relevance": found.relevance,
        "beta": found.beta,
        "exploration": found.exploration,
        "coverage": found.coverage,
        "profile": found.initial == "profile",
        "structure": found.structure,
        "rules": found.rules,
        "objective": found.objective,
        "active_below": found.active_below,
        "uplink": found.uplink,
        "downlink": found.downlink,
        "router_factor": found.gate_rate_factor,
        "warmup": found.gate_warmup,
    }
    return Method(name=name, **{**shared, **own})


OURS = _as("ours")
_FEDIT = _as("fedit")
_FEDMOE = _as("fedmoe", holds="theta", reserve=0.1)
_METHODS = (
    replace(_FEDIT, name="dense-lora", holds="dense"),
    replace(_FEDIT, name="linear-probe", trains="probe"),
    _FEDIT,
    _as("fedprox"),
    _as("scaffold"),
    _as("random"),
    _FEDMOE,
    _as("hfedmoe-printed", "hfedmoe", relevance="norm", holds="all", over_budget=True),
    _as("hfedmoe-fixed"),
    _as("fft-moe", trains="adapters"),
    _as("flame"),
    OURS,
    replace(_FEDIT, name="all-experts", holds="all", over_budget=True),
)
METHODS = {method.name: method for method in _METHODS}

SELECTION = tuple(
    replace(OURS, **{"name": name, "tuned_as": "ours", "coverage": 0.0, **how})  # type: ignore[arg-type]
    for name, how in {
        "random": {"holds": "random", "profile": False},
        "frequency": {"relevance": "frequency", "beta": 0.0},
        "hfedmoe-printed": {"relevance": "hfedmoe"},
        "hfedmoe-fixed": {"relevance": "mass"},
        "oracle": {"relevance": "oracle"},
        "ours": {"coverage": OURS.coverage},
    }.items()
)
"""The same training and aggregation, and as many experts: only what is held differs."""


def _ours(name: str, **how: object) -> Method:
    return replace(OURS, name=name, tuned_as="ours", **how)  # type: ignore[arg-type]


ABLATIONS = (
    OURS,
    _ours("without-stage-1", profile=False),
    replace(_FEDMOE, name="fedmoe-without-stage-1", tuned_as="fedmoe", profile=False),
    replace(_FEDMOE, name="fedmoe-without-stage-2", tuned_as="fedmoe", structure="none"),
    _ours("without-coverage", coverage=0.0),
    _ours("without-label-prior", objective=replace(OURS.objective, label_prior=0.0)),
    _ours(
        "without-large-epsilon", objective=replace(OURS.objective, adam_eps=Objective().adam_eps)
    ),
    replace(
        _FEDIT,
        name="fedit-with-label-prior",
        tuned_as="fedit",
        objective=replace(_FEDIT.objective, label_prior=1.0),
    ),
    _ours("relevance-mass", relevance="mass"),
    _ours("relevance-taylor", relevance="taylor"),
    _ours("relevance-labels", relevance="labels"),
    _ours("lora-factors", rules=replace(OURS.rules, lora="factors")),
    _ours("lora-flex", rules=replace(OURS.rules, lora="flex")),
    _ours("lora-ffa", rules=replace(OURS.rules, lora="ffa")),
    _ours("lora-alternate", rules=replace(OURS.rules, lora="alternate")),
    _ours("lora-fedsa", rules=replace(OURS.rules, lora="fedsa")),
    _ours("lora-stack", rules=replace(OURS.rules, lora="stack"), over_budget=True),
)
UPLINK = tuple(_ours(f"ours-{kind}", uplink=kind) for kind in ("float32", "int8", "int4"))


def methods_of(suite: str) -> tuple[Method, ...]:
    """The methods of a suite."""
    if suite.startswith("selection-"):
        return SELECTION
    if suite.startswith("ablation-"):
        return ABLATIONS
    if suite.startswith("uplink-"):
        return UPLINK
    return _METHODS

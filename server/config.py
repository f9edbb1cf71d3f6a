"""The server's command line as one frozen value. Defaults live in `Config`, those of a method in `presets`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from protocol import schema
from protocol.chunks import CHUNK_BYTES
from protocol.messages import Task
from protocol.objective import Objective
from server.broker import KINDS
from server.coverage import DECAY
from server.presets import OURS, PRESETS, rules_as_flags
from server.relevance import LAM, RELEVANCE
from server.rules import Gate, Lora, Members, Robust, Rules, SignConflict, Weighting
from server.strategies import FIXED

_EXAMPLE = """example:
  python -m server --store store --state state --rounds 5 --min-devices 2 --task task.json
  (task.json: {"template": "Text: {text}\\nTopic:", "labels": ["sports", "music"]})"""
_METHODS = "methods:\n" + "".join(f"  {n:<24}{p.says}\n" for n, p in PRESETS.items()) + "\n"
INITIAL = ("profile", "prior", "random")
STRUCTURES = ("none", "freeze", "retry")
UPLINKS: tuple[Literal["float32", "int8", "int4"], ...] = ("float32", "int8", "int4")
DOWNLINKS: tuple[Literal["float32", "float16"], ...] = ("float32", "float16")
_OF_METHOD = OURS.settings()


class ConfigError(ValueError):
    """A flag or task file that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What one server is asked to do. Times in seconds, sizes in bytes."""

    store: Path
    state: Path
    host: str = "127.0.0.1"
    port: int = 8470
    broker: str = "auto"
    device_broker: str = ""
    fleet: str = "home"
    task: Task = Task()
    base_name: str = ""
    rounds: int = 5
    steps: int = 20
    learning_rate: float = 3e-3
    router_learning_rate: float = 3e-4
    method: str = "ours"
    gate_rate_factor: float = OURS.gate_rate_factor
    gate_warmup: int = OURS.gate_warmup
    objective: Objective = OURS.objective
    active_below: float = OURS.active_below
    cap_share: float = OURS.cap_share
    uplink: Literal["float32", "int8", "int4"] = OURS.uplink
    downlink: Literal["float32", "float16"] = OURS.downlink
    min_updates: int = 1
    min_devices: int = 1
    deadline: float = 600.0
    per_round: int = 0
    aggregate: Lora = OURS.rules.lora
    gate: Gate = OURS.rules.gate
    members: Members = OURS.rules.members
    weighting: Weighting = OURS.rules.weighting
    temperature: float = OURS.rules.temperature
    tau: float = OURS.rules.tau
    prior: float = OURS.rules.prior
    copy_single: bool = OURS.rules.copy_single
    staleness: float = OURS.rules.staleness
    clip: float = OURS.rules.clip
    sign_conflict: SignConflict = OURS.rules.sign_conflict
    robust: Robust = OURS.rules.robust
    gate_blend: float = OURS.rules.gate_blend
    seed: int = 0
    beta: float = OURS.beta
    exploration: float = OURS.exploration
    coverage: float = OURS.coverage
    initial: str = OURS.initial
    reprofile: int = OURS.reprofile
    structure: str = OURS.structure
    patience: int = 3
    similar: int = 3
    head_room: float = OURS.head_room
    relevance: str = OURS.relevance
    lam: float = LAM
    strategy: str = OURS.strategy
    decay: float = DECAY
    uplink_bytes: int = 0
    profile: Literal["resident", "full"] = "resident"
    profile_rows: int = 0
    profile_clip: float = 0.0
    profile_noise: float = 0.0
    chunk_bytes: int = CHUNK_BYTES
    upload_budget: int = 64 << 20
    require_token: bool = False
    exit_when_done: bool = False

    @property
    def rules(self) -> Rules:
        """How updates are combined; raises ValueError for a value out of its range."""
        flags = rules_as_flags({f.name: f.name for f in fields(Rules)})
        return Rules(**{field: getattr(self, flag) for flag, field in flags.items()})


def _parser() -> argparse.ArgumentParser:
    default = {f.name: f.default for f in fields(Config)}
    p = argparse.ArgumentParser(
        prog="python -m server",
        description="Choose experts for devices, lease them work, aggregate their updates.",
        epilog=_METHODS + _EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def flag(name: str, text: str, **more: Any) -> None:
        value = default[name]
        if isinstance(value, bool):
            of_method = name in _OF_METHOD
            more["action"] = argparse.BooleanOptionalAction if of_method else "store_true"
        else:
            more.setdefault("type", type(value))
            more.setdefault("metavar", type(value).__name__.upper())
            if value != "":
                text += f" (default: {value})"
        # What is not given stays out, so that the method can say it.
        p.add_argument(f"--{name.replace('_', '-')}", help=text, default=argparse.SUPPRESS, **more)

    p.add_argument("--store", type=Path, required=True, help="what export.build wrote")
    p.add_argument("--state", type=Path, required=True, help="adapters, history, database")
    flag(
        "method", "sets the flags that make up a method; those given win. See below", metavar="NAME"
    )
    flag("host", "address to listen on")
    flag("port", "HTTP port, 0 for a free one")
    kinds = "|".join(["auto", *KINDS])
    flag("broker", f"{kinds}|mqtt[s]://[user:password@]host:port", metavar="BROKER")
    flag(
        "device_broker",
        "what devices are told, if not --broker less its password",
        metavar="BROKER",
    )
    flag("fleet", "name of the fleet, part of every topic")
    p.add_argument(
        "--task", type=Path, metavar="FILE.json", help="what is taught: template, labels, answer"
    )
    flag("base_name", "what the adapter's card calls its base", metavar="DIR_OR_HUB_ID")
    flag("rounds", "training rounds")
    flag("steps", "optimiser steps per lease")
    flag("learning_rate", "of the LoRA factors")
    flag("router_learning_rate", "of the router rows")
    flag(
        "gate_rate_factor",
        "router rows learn at this share of --learning-rate; 0: as --router-learning-rate says",
    )
    flag("gate_warmup", "first training rounds in which router rows do not learn", metavar="N")
    p.add_argument(
        "--objective",
        type=Path,
        metavar="FILE.json",
        help="local objective: what differs from plain cross entropy, see protocol/objective.py",
    )
    flag(
        "active_below",
        "the objective's `active` is for devices that hold less than this share of the experts, 0: all",
        metavar="SHARE",
    )
    flag(
        "cap_share",
        "the objective's `cap`, as a share of what a device holds, 0: as the objective says",
        metavar="SHARE",
    )
    flag("uplink", "how updates are coded, with error feedback", choices=UPLINKS, metavar=None)
    flag("downlink", "type of the adapter on its way down", choices=DOWNLINKS, metavar=None)
    flag("min_updates", "updates a round needs to close at its deadline")
    flag("min_devices", "devices to wait for before the first round")
    flag("deadline", "seconds a round may take", metavar="SECONDS")
    flag("per_round", "devices drawn per training round, 0 for all", metavar="N")
    flag("aggregate", "how LoRA factors are combined", choices=get_args(Lora), metavar=None)
    flag("gate", "how router rows are combined", choices=get_args(Gate), metavar=None)
    flag("members", "who counts for an expert", choices=get_args(Members), metavar=None)
    flag("weighting", "what a device's data is", choices=get_args(Weighting), metavar=None)
    flag("temperature", "power of the share of tokens that trained an expert")
    flag("tau", "least mean router probability of those who count for an expert")
    flag("prior", "prior mass of the old value, share of the median mass")
    flag("copy_single", "copy an expert that one device trained as it is")
    flag("staleness", "power of 1 / (1 + age of an update in rounds)")
    flag("clip", "changes of at most so many median norms, 0 for any")
    conflict = "coordinates on whose sign devices disagree"
    flag("sign_conflict", conflict, choices=get_args(SignConflict), metavar=None)
    flag("robust", "mean of 3 or more holders", choices=get_args(Robust), metavar=None)
    flag("gate_blend", "share of mean against peak in the importance of an expert for the gate")
    flag("seed", "of device sampling and of the leases")
    flag("beta", "weight of redundancy against relevance")
    flag("exploration", "bonus for experts that were rarely trained")
    flag("coverage", "share of slots for the experts with the fewest holders")
    flag("initial", "first choice by: profiling, the base, chance", choices=INITIAL, metavar=None)
    flag("reprofile", "training rounds until all devices profile again, 0 for never", metavar="N")
    flag(
        "structure",
        "grow and shrink what each device trains; after a failed change: freeze or retry",
        choices=STRUCTURES,
        metavar=None,
    )
    flag("patience", "turns without a better score before --structure changes a device")
    flag("similar", "devices whose sub-models it goes by", metavar="N")
    flag("head_room", "share of its trainable slots that a device begins with under --structure")
    known = sorted(RELEVANCE)
    flag("relevance", "how an expert's relevance is estimated", choices=known, metavar=None)
    flag("lam", "weight of the general against the specific (mass, hfedmoe)")
    flag("strategy", "how slots are filled; history suits --per-round", choices=FIXED, metavar=None)
    flag("decay", "per round, of the training that --strategy history remembers")
    flag("uplink_bytes", "cap of an update: the best experts that fit are trained; 0 for none")
    flag(
        "profile",
        "what devices measure at first: the experts they hold, or the whole model expert by expert",
        choices=("resident", "full"),
        metavar=None,
    )
    flag("profile_rows", "rows a device samples for a full profile, 0: its own choice", metavar="N")
    flag(
        "profile_clip",
        "tokens that one row counts for at most in a full profile, 0: all",
        metavar="TOKENS",
    )
    flag("profile_noise", "Gaussian noise on a full profile, in shares of what one row can change")
    flag("chunk_bytes", "bytes of an update per message")
    flag("upload_budget", "bytes of uploads under way at a time")
    flag("require_token", "serve blobs only to registered devices")
    flag("exit_when_done", "end when the run is over")
    return p


def read_task(path: Path) -> Task:
    """Read a task file; raises ConfigError."""
    try:
        task = schema.from_dict(Task, json.loads(path.read_bytes()), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except schema.SchemaError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if task.answer == "text" and task.labels:
        raise ConfigError(f"{path}: answer 'text' wants no labels, {len(task.labels)} found")
    if task.template.count("{text}") != 1:
        raise ConfigError(f"{path}: template wants {{text}} exactly once")
    return task


def read_objective(path: Path) -> Objective:
    """Read an objective file; raises ConfigError."""
    try:
        return schema.from_dict(Objective, json.loads(path.read_bytes()), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except schema.SchemaError as error:
        raise ConfigError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error


def check(config: Config) -> Config:
    """Refuse values out of range; raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", config.fleet):
        raise ConfigError(f"--fleet '{config.fleet}': letters, digits, - and _ wanted")
    ranges: dict[str, tuple[float, float]] = {
        "port": (0, 65535),
        "rounds": (0, 100000),
        "steps": (1, 10**7),
        "learning_rate": (0, 10),
        "router_learning_rate": (0, 10),
        "gate_rate_factor": (0, 100),
        "gate_warmup": (0, 100000),
        "min_updates": (1, 10**6),
        "min_devices": (1, 10**6),
        "deadline": (0.1, 10**7),
        "per_round": (0, 10**6),
        "seed": (0, 2**62),
        "beta": (0, 100),
        "exploration": (0, 100),
        "coverage": (0, 1),
        "active_below": (0, 1),
        "cap_share": (0, 1),
        "reprofile": (0, 10**6),
        "patience": (1, 10**6),
        "similar": (1, 10**6),
        "head_room": (0.01, 1),
        "lam": (0, 1),
        "decay": (0, 1),
        "uplink_bytes": (0, 2**40),
        "profile_rows": (0, 10**7),
        "profile_clip": (0, 10**6),
        "profile_noise": (0, 10**6),
        "chunk_bytes": (256, 200 << 10),  # our own broker takes packets of 256 KiB
        "upload_budget": (1, 2**40),
    }
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if not low <= value <= high:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {value} found, {low} to {high} wanted")
    if config.profile_noise and not config.profile_clip:
        raise ConfigError("--profile-noise wants --profile-clip: noise must know what a row can do")
    if config.profile == "resident" and (config.profile_rows or config.profile_clip):
        raise ConfigError("--profile-rows, -clip and -noise are for --profile full")
    try:
        rules = config.rules
    except ValueError as error:
        raise ConfigError(f"--{error}".replace("_", "-")) from error
    if rules.lora == "stack":
        raise ConfigError(
            "--aggregate stack: stacked products have to be merged into the weights, and the experts of a store are "
            "quantised and fixed; svd or flex wanted"
        )
    return config


def parse(argv: Sequence[str] | None) -> Config:
    """Command line -> Config.

    Raises
    ------
    ConfigError
        Unreadable task, unknown method, value out of range.
    SystemExit
        From argparse: unknown flags, --help.
    """
    values = vars(_parser().parse_args(argv))
    task, objective = values.pop("task"), values.pop("objective")
    if task is not None:
        values["task"] = read_task(task)
    if objective is not None:
        values["objective"] = read_objective(objective)
    method = values.get("method", Config.method)
    if method not in PRESETS:
        raise ConfigError(f"--method '{method}' found, one of {', '.join(PRESETS)} wanted")
    if "router_learning_rate" in values:
        values.setdefault("gate_rate_factor", 0.0)  # or the method's share would win over it
    return check(Config(**{**PRESETS[method].settings(), **values}))

"""A scenario: which devices there are and what they are asked to do. TOML -> frozen dataclasses."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import device_profiles
from protocol import schema, topics
from protocol.objective import Objective

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class ScenarioError(ValueError):
    """A scenario that cannot be run. One line."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What every program of the run has in common; see `export.build`."""

    rank: int = 4  # the largest; the planner gives each expert this, half of it, or none
    answers: int = 2
    sequence: int = 0  # 0: what nine of ten rows need
    batch: int = 0  # 0: as many rows as make `tokens`
    tokens: int = 512  # of a step; memory depends on it, and so long rows come in smaller batches


@dataclass(frozen=True, kw_only=True)
class Server:
    """Flags of `python -m server`."""

    rounds: int = 5
    steps: int = 20
    learning_rate: float = 0.01
    router_learning_rate: float = 0.003
    min_updates: int = 1
    deadline: float = 60.0
    per_round: int = 0  # devices drawn each round; 0: all
    aggregate: str = "svd"
    objective: Objective | None = None  # None: the server's own


@dataclass(frozen=True, kw_only=True)
class Data:
    """How rows are divided."""

    rows_per_device: int = 500
    held_back: int = 64  # of a device's own rows, for its accuracy
    test_rows: int = 300  # for the global accuracy; on no device
    alpha: float = 0.5  # of the Dirichlet distribution: smaller is more skewed


@dataclass(frozen=True, kw_only=True)
class Device:
    """One emulated device."""

    name: str
    profile: str
    scale_budget: float = 1.0  # times the profile's budget
    delay: float = 0.0  # seconds after the others


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything a run is, apart from its data."""

    name: str
    seed: int = 0
    artifact: Artifact = Artifact()
    server: Server = Server()
    data: Data = Data()
    device: tuple[Device, ...]

    @property
    def profiles(self) -> dict[str, float]:
        """Profile -> its scale, in order of first use."""
        return {device.profile: device.scale_budget for device in self.device}


def _check(scenario: Scenario, where: str) -> None:
    scales: dict[str, float] = {}
    names: set[str] = set()
    for device in scenario.device:
        at = f"{where}: device '{device.name}'"
        if not topics.ID.fullmatch(device.name):
            raise ScenarioError(f"{at}: letters, digits, '-' and '_' wanted in a name")
        if device.name in names:
            raise ScenarioError(f"{at}: named twice")
        names.add(device.name)
        try:
            device_profiles.load(device.profile)
        except device_profiles.ProfileError as error:
            raise ScenarioError(f"{at}: {error}") from error
        if device.scale_budget <= 0 or device.delay < 0:
            raise ScenarioError(f"{at}: scale_budget above 0 and delay of 0 or more wanted")
        # One program per profile: two scales would be two programs of the same name.
        if scales.setdefault(device.profile, device.scale_budget) != device.scale_budget:
            raise ScenarioError(
                f"{at}: scale_budget {device.scale_budget} found, {scales[device.profile]} wanted "
                f"as for the other devices of profile '{device.profile}'"
            )
    if not scenario.device:
        raise ScenarioError(f"{where}: no device")
    for section, key, least in (
        (scenario.artifact, "rank", 1),
        (scenario.artifact, "batch", 0),
        (scenario.artifact, "tokens", 1),
        (scenario.artifact, "answers", 1),
        (scenario.artifact, "sequence", 0),
        (scenario.server, "rounds", 1),
        (scenario.server, "steps", 1),
        (scenario.server, "min_updates", 1),
        (scenario.server, "deadline", 1),
        (scenario.data, "rows_per_device", 10),
        (scenario.data, "test_rows", 2),
    ):
        if (value := getattr(section, key)) < least:
            raise ScenarioError(f"{where}: {key} {value} found, {least} or more wanted")
    if scenario.data.alpha <= 0:
        raise ScenarioError(f"{where}: alpha {scenario.data.alpha} found, more than 0 wanted")
    if scenario.server.min_updates > len(scenario.device):
        raise ScenarioError(
            f"{where}: min_updates {scenario.server.min_updates} found, "
            f"at most {len(scenario.device)} devices"
        )


def parse(text: str, where: str) -> Scenario:
    """Read a scenario; `where` starts every message.

    Raises
    ------
    ScenarioError
        Not TOML, unknown key or profile (the nearest is named), wrong type or range.
    """
    try:
        scenario = schema.from_dict(Scenario, tomllib.loads(text), where)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{where}: not TOML: {error}") from error
    except schema.SchemaError as error:
        raise ScenarioError(str(error)) from error
    _check(scenario, where)
    return scenario


def load(path: Path) -> Scenario:
    """Read a scenario file; raises ScenarioError."""
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise ScenarioError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: cannot be read: {error}") from error


def check(scenario: Scenario, where: str) -> Scenario:
    """Check again after flags have replaced fields; raises ScenarioError."""
    _check(scenario, where)
    return scenario

"""One run of the real programs: a server with its broker, a judge, and an edge process per device."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lab.judge import Judge
from lab.live import View, fetch_status
from lab.processes import Child, ProcessError, Processes
from lab.scenario import Device, Scenario
from protocol import schema

log = logging.getLogger(__name__)
LISTENING = "listening on "
# Two cores shall not be fought over by threads of six programs; a device of the fleet is one thread.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where things lie and what the programs are told, apart from the scenario."""

    store: Path
    base: Path
    folder: Path  # of this run
    task: Path
    test: Path
    data: dict[str, Path]  # device -> its rows
    backend: str
    broker: str
    enforce: Mapping[str, str]  # device -> edge's --enforce

    @property
    def state(self) -> Path:
        """The server's state."""
        return self.folder / "state"

    @property
    def objective(self) -> Path:
        """What the scenario says of the local objective, for the server."""
        return self.folder / "objective.json"


def server_command(plan: Plan, scenario: Scenario) -> list[str]:
    """Module and flags of the server."""
    server = scenario.server
    flags = {
        "store": plan.store,
        "state": plan.state,
        "port": 0,
        "broker": plan.broker,
        "task": plan.task,
        "rounds": server.rounds,
        "steps": server.steps,
        "learning-rate": server.learning_rate,
        "router-learning-rate": server.router_learning_rate,
        "min-updates": server.min_updates,
        "min-devices": len(scenario.device),
        "deadline": server.deadline,
        "per-round": server.per_round,
        "aggregate": server.aggregate,
        "seed": scenario.seed,
    }
    if server.objective is not None:
        flags["objective"] = plan.objective
    return [
        "server",
        *(word for name, value in flags.items() for word in (f"--{name}", str(value))),
    ]


def edge_command(plan: Plan, scenario: Scenario, device: Device, url: str) -> list[str]:
    """Module and flags of one device."""
    flags = {
        "server": url,
        "profile": device.profile,
        "data": plan.data[device.name],
        "text": "text",
        "label": "label",
        "device-id": device.name,
        "workdir": plan.folder / "devices" / device.name,
        "backend": plan.backend,
        "enforce": plan.enforce[device.name],
        "held-back": scenario.data.held_back,
        "trust": plan.store / "key.pub",
    }
    return ["edge", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def judge_flags(plan: Plan, scenario: Scenario) -> list[str]:
    """Flags of `lab.evaluate`; `lab.central` takes them too."""
    return [
        *("--base", str(plan.base), "--rows", str(plan.test), "--task", str(plan.task)),
        *("--sequence", str(scenario.artifact.sequence)),
        *("--answers", str(scenario.artifact.answers)),
    ]


def wait_for_url(server: Child, patience: float = 30.0) -> str:
    """The address that the server says it listens on; raises ProcessError."""
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        for line in server.log.read_text(encoding="utf-8", errors="replace").splitlines():
            if LISTENING in line:
                return line.split(LISTENING, 1)[1].split()[0]
        if server.ended is not None:
            break
        time.sleep(0.05)
    raise ProcessError(server.failure())


def _start_edges(processes: Processes, plan: Plan, scenario: Scenario, url: str) -> list[Child]:
    edges = []
    start = time.monotonic()
    for device in sorted(scenario.device, key=lambda d: d.delay):
        time.sleep(max(0.0, start + device.delay - time.monotonic()))
        edges.append(
            processes.start(
                f"edge-{device.name}",
                edge_command(plan, scenario, device, url),
                environment=ONE_THREAD,
            )
        )
    return edges


def run(
    processes: Processes, plan: Plan, scenario: Scenario, view: View
) -> tuple[frozenset[str], dict[int, float]]:
    """Run the scenario to its end.

    Returns
    -------
    (gone, scores) : devices whose process ended before the run did; adapter version -> global accuracy

    Raises
    ------
    ProcessError
        The server or the judge ended, every device did, or the run takes far too long.
    """
    if scenario.server.objective is not None:
        plan.objective.write_text(json.dumps(schema.to_dict(scenario.server.objective)))
    server = processes.start("server", server_command(plan, scenario), environment=ONE_THREAD)
    url = wait_for_url(server)
    view.say(f"server at {url}, status at {url}/v1/run, logs in {processes.logs}")
    edges = _start_edges(processes, plan, scenario, url)
    judge = Judge(processes, judge_flags(plan, scenario), plan.state / "adapters")
    # Every round may take its deadline twice; the rest is for starting up.
    limit = time.monotonic() + 2 * (scenario.server.rounds + 2) * scenario.server.deadline + 120
    gone: set[str] = set()
    while True:
        status = fetch_status(url)
        judge.look()
        if status is not None:
            view.show(status, judge.scores)
            if status["state"] == "over":
                break
        if server.ended is not None:
            raise ProcessError(server.failure())
        for edge in edges:
            if edge.ended is not None and edge.name not in gone:
                gone.add(edge.name)
                view.say(edge.failure())
        if len(gone) == len(edges):
            raise ProcessError(f"every device has gone; {edges[-1].failure()}")
        if time.monotonic() > limit:
            raise ProcessError(f"the run is not over after {limit:.0f} s; see {processes.logs}")
        time.sleep(0.4)
    scores = judge.finish()
    view.show(status, scores)
    _leave(edges)
    processes.stop(*(edge.name for edge in edges), "server", "judge")
    return frozenset(name.removeprefix("edge-") for name in gone), scores


def _leave(edges: list[Child], patience: float = 10.0) -> None:
    """Give the devices time to hear that the run is over."""
    limit = time.monotonic() + patience
    while any(edge.ended is None for edge in edges) and time.monotonic() < limit:
        time.sleep(0.1)

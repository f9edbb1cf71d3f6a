"""Run a scenario from the checkpoint to the report: python -m lab.run [--scenario FILE] [--data FILE ...].

Cuts the base for every device, divides the data, starts one server, one broker and a process per device, watches them,
scores every global adapter and writes a report.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

import reference_base
from lab import artifacts, conclude, fleet, prepare, report, scenario
from lab.artifacts import ArtifactError
from lab.cgroups import memory_groups
from lab.conclude import ConclusionError
from lab.dataset import DataError
from lab.fleet import Plan
from lab.history import HistoryError
from lab.live import View
from lab.prepare import FolderError
from lab.processes import ProcessError, Processes
from lab.scenario import Scenario, ScenarioError
from protocol.manifest import ManifestError

log = logging.getLogger(__name__)
DEMO = Path(__file__).parent / "scenarios" / "demo.toml"
ENFORCE = ("auto", "cgroup", "rlimit", "none")


class LabError(RuntimeError):
    """A run that cannot go on for a reason that no other boundary has. One line."""


def run(args: argparse.Namespace, console: Console) -> Path:
    """Everything, in order; returns the report's path."""
    start = time.monotonic()
    plan_of_run = settings(args)
    rows = prepare.read_rows(args.data, args.text, args.label, plan_of_run.seed)
    plan_of_run = prepare.fit_sequence(plan_of_run, rows, args.base)
    split = prepare.divide(rows, plan_of_run)
    folder = prepare.fresh_folder(args.out)
    task, test, data = prepare.write_data(folder, split, plan_of_run)
    names = [device.name for device in plan_of_run.device]
    # In this order: a cgroup can only be removed when its processes have gone.
    with enforcement(args.enforce, names) as limits, Processes(folder / "logs") as processes:
        store, built = cut(processes, args, plan_of_run, console)
        building = time.monotonic() - start if built else 0.0
        plan = Plan(
            store=store,
            base=args.base,
            folder=folder,
            task=task,
            test=test,
            data=data,
            backend=args.backend,
            broker=args.broker,
            enforce=limits,
        )
        with View(console) as view:
            gone, scores = fleet.run(processes, plan, plan_of_run, view)
        ran = time.monotonic() - start
        result = conclude.put_together(
            plan,
            plan_of_run,
            "generated utterances to an assistant" if args.data is None else args.data.name,
            split,
            gone,
            scores,
            ran,
            building,
        )
        page = report.write(result, folder)
        if args.ceiling:
            ceiling = conclude.train_centrally(processes, plan, plan_of_run, console)
            result = dataclasses.replace(result, ceiling=ceiling)
            page = report.write(result, folder)
        report.print_table(result, console)
        conclude.verify(plan, console)
    return page


def settings(args: argparse.Namespace) -> Scenario:
    """The scenario, with what flags say instead; raises ScenarioError."""
    found = scenario.load(args.scenario)
    devices = found.device[: args.devices] if args.devices else found.device
    devices = tuple(
        dataclasses.replace(d, scale_budget=d.scale_budget * args.scale_budget) for d in devices
    )

    def over(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    server = dataclasses.replace(
        found.server,
        min_updates=min(found.server.min_updates, len(devices)),
        **over(rounds=args.rounds, steps=args.steps, learning_rate=args.learning_rate),
    )
    return scenario.check(
        dataclasses.replace(
            found,
            device=devices,
            server=server,
            artifact=dataclasses.replace(
                found.artifact,
                **over(sequence=args.sequence, batch=args.batch, tokens=args.tokens),
            ),
            data=dataclasses.replace(found.data, **over(alpha=args.alpha)),
            seed=found.seed if args.seed is None else args.seed,
        ),
        str(args.scenario),
    )


@contextlib.contextmanager
def enforcement(how: str, names: list[str]) -> Iterator[Mapping[str, str]]:
    """Device -> the edge's --enforce: it joins its cgroup when it knows its baseline; raises LabError."""
    if how in ("auto", "cgroup"):
        with memory_groups(names) as groups:
            if groups:
                yield {name: f"cgroup:{groups[name]}" for name in names}
                return
        if how == "cgroup":
            raise LabError("--enforce cgroup: memory cgroups cannot be made here")
    yield dict.fromkeys(names, "none" if how == "none" else "rlimit")


def cut(
    processes: Processes, args: argparse.Namespace, chosen: Scenario, console: Console
) -> tuple[Path, bool]:
    """Build or find the artifacts; raises ArtifactError."""
    artifact = chosen.artifact
    started = time.monotonic()
    with console.status(f"cutting the base for {len(chosen.profiles)} profiles ..."):
        store, built = artifacts.build(
            processes,
            args.base,
            artifact,
            chosen.server.steps,
            chosen.profiles,
            args.cache.resolve(),
            at_once=os.cpu_count() or 1,
        )
    how = f"built in {time.monotonic() - started:.0f} s" if built else "from the cache"
    console.print(
        f"artifacts {how}: {store} (batch {artifact.batch} x {artifact.sequence} tokens, "
        f"rank {artifact.rank})",
        highlight=False,
    )
    return store, built


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab.run",
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python -m lab.run --data news.jsonl.gz --text text --label topic --ceiling",
    )
    parser.add_argument("--scenario", type=Path, default=DEMO, help="TOML (default: the demo)")
    parser.add_argument("--data", type=Path, help=".jsonl or .jsonl.gz (default: generated)")
    parser.add_argument("--text", default="text", help="field of --data (default: %(default)s)")
    parser.add_argument("--label", default="label", help="field of --data (default: %(default)s)")
    parser.add_argument(
        "--base", type=Path, default=reference_base.MODEL_DIR, help="checkpoint folder"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=artifacts.ROOT / ".demo" / "run",
        help="folder of this run (default: .demo/run)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=artifacts.ROOT / ".demo",
        help="folder of artifacts (default: .demo)",
    )
    parser.add_argument("--devices", type=int, help="only the first so many of the scenario")
    parser.add_argument("--rounds", type=int, help="instead of the scenario's")
    parser.add_argument("--steps", type=int, help="instead of the scenario's")
    parser.add_argument("--learning-rate", type=float, help="instead of the scenario's")
    parser.add_argument("--alpha", type=float, help="skew; smaller is more (scenario's)")
    parser.add_argument("--seed", type=int, help="instead of the scenario's")
    parser.add_argument("--sequence", type=int, help="tokens per row (default: what rows need)")
    parser.add_argument("--batch", type=int, help="rows per step (default: by --tokens)")
    parser.add_argument("--tokens", type=int, help="tokens per step, instead of the scenario's")
    parser.add_argument(
        "--scale-budget", type=float, default=1.0, help="times every budget of the scenario"
    )
    parser.add_argument("--backend", default="executorch", help="of the devices (%(default)s)")
    parser.add_argument("--broker", default="auto", help="see python -m server --help")
    parser.add_argument(
        "--enforce", choices=ENFORCE, default="auto", help="memory limits: cgroup, else rlimit"
    )
    parser.add_argument(
        "--ceiling", action="store_true", help="also train the whole base in one place"
    )
    parser.add_argument("--verbose", action="store_true")
    return parser


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the report's path last."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING)
    # Ended from outside, the lab still stops its children in order and removes its cgroups.
    signal.signal(signal.SIGTERM, _stop)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    try:
        page = run(args, console)
    except (
        ArtifactError,
        ConclusionError,
        DataError,
        FolderError,
        HistoryError,
        LabError,
        ManifestError,
        ProcessError,
        ScenarioError,
    ) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lab: stopped", file=sys.stderr)
        return 130
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

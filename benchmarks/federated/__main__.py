"""Run a suite of the scoreboard: python -m benchmarks.federated --suite agnews-0.1 --data DIR --out runs

Every run is one file of JSON lines, OUT/<suite>/<method>/<seed>.jsonl, written whole when it ends; what is there is
not run again, so a stopped sweep goes on where it was. `python -m benchmarks.federated.page --runs runs` makes tables,
figures and a page of them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.federated import methods, plan, schedule, suites
from benchmarks.federated.tasks import TaskError

log = logging.getLogger(__name__)
REFERENCE = Path(__file__).parents[2] / "reference_base" / "model"


class SweepError(ValueError):
    """A sweep that cannot be run; one line."""


def numbers(text: str) -> tuple[int, ...]:
    """Seeds from "0,1,2"; raises argparse's error."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} found, numbers like 0,1,2 wanted") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.federated", description=(__doc__ or "").splitlines()[0]
    )
    known = ", ".join(suites.SUITES)
    p.add_argument("--suite", action="append", required=True, help=f"repeatable; one of {known}")
    p.add_argument("--method", action="append", help="repeatable (default: those of the suite)")
    p.add_argument("--seeds", type=numbers, default=(0, 1, 2))
    p.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of data sets")
    p.add_argument("--base", type=Path, default=REFERENCE, help="checkpoint directory")
    p.add_argument("--out", type=Path, default=Path("runs"))
    p.add_argument("--jobs", type=int, default=0, help="processes (default: one per core)")
    p.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    p.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster in place of local processes")
    p.add_argument("--tuned", type=Path, help="learning rates found by --tune, JSON")
    p.add_argument(
        "--tune",
        action="store_true",
        help="measure every method's grid on validation rows with one seed, and write the best to --tuned",
    )
    return p


def check_device(name: str) -> None:
    """Whether torch can compute on a device; raises SweepError."""
    import torch

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise SweepError(f"--device {name}: torch cannot use it: {first}") from error


def checked(args: argparse.Namespace) -> list[plan.Task]:
    """What is to be run; raises SweepError."""
    for name in args.suite:
        if name not in suites.SUITES:
            raise SweepError(f"--suite {name}: one of {', '.join(suites.SUITES)} wanted")
    offered = list(methods.METHODS)
    if not args.tune:
        offered = list(dict.fromkeys(m.name for s in args.suite for m in methods.methods_of(s)))
    for name in args.method or ():
        if name not in offered:
            raise SweepError(f"--method {name}: one of {', '.join(offered)} wanted")
    if not (args.base / "config.json").is_file():
        raise SweepError(f"--base {args.base}: no config.json there")
    if args.ray is None:  # a cluster's machines may have what this one has not
        check_device(args.device)
    if args.tune and args.tuned is None:
        raise SweepError("--tune: --tuned FILE is wanted, for what it finds")
    try:
        if args.tune:
            return plan.grid(args.suite, args.method)
        return plan.tasks(args.suite, args.method, args.seeds, args.tuned)
    except plan.PlanError as error:
        raise SweepError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        tasks = checked(args)
        settings = schedule.Settings(args.data, args.base, args.out, args.device)
        failed = schedule.run(tasks, settings, jobs=args.jobs, ray=args.ray)
        if args.tune:
            print(plan.choose(args.out, tasks, args.tuned))
    except (SweepError, TaskError, schedule.ScheduleError) as error:
        print(f"benchmarks.federated: {error}", file=sys.stderr)
        return 2
    if failed:
        print(f"benchmarks.federated: {len(failed)} runs failed: {failed[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

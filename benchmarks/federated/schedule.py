"""Runs over processes, here or on a Ray cluster: each becomes one file, whole or not at all."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.federated.plan import Task

log = logging.getLogger(__name__)
SHARE = 0.1  # of a GPU for a run on Ray; a run's kernels are small


class ScheduleError(ValueError):
    """A sweep that cannot be started; one line."""


@dataclass(frozen=True)
class Settings:
    """Where things are, and what computes."""

    data: Path
    base: Path
    out: Path
    device: str = "cpu"


def finished(path: Path) -> bool:
    """Whether a run's file is there and whole."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        last = b""
        for line in file:
            last = line
    try:
        return bool(json.loads(last).get("kind") == "end")
    except ValueError:
        return False


def work(task: Task, settings: Settings) -> str:
    """Run one task and write its file; returns a line for the log. Runs in a process of its own."""
    import torch

    from benchmarks.federated import simulate, tasks, world

    torch.set_num_threads(1)
    started = time.monotonic()
    base = world.open_base(settings.base, settings.out / ".base" / settings.base.name)
    here = world.make(task.suite, task.seed, base, settings.data)
    heldout = tasks.heldout_text(settings.data, base.tokenizer)
    path = task.path(settings.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    cache = settings.out / ".cache" / base.index.base[:12]
    with open(partial, "w", encoding="utf-8") as file:
        lines = simulate.run(
            here, task.method, cache, heldout, tuning=task.tuning, device=settings.device
        )
        for line in lines:
            file.write(json.dumps(line) + "\n")
    os.replace(partial, path)
    return f"{path.relative_to(settings.out)}: {time.monotonic() - started:.0f} s"


def run(
    tasks: Sequence[Task], settings: Settings, *, jobs: int = 0, ray: str | None = None
) -> list[str]:
    """Run what is not there yet.

    Parameters
    ----------
    jobs : processes; 0: one per core
    ray : address of a Ray cluster, "local" for one on this machine; its machines need the code, data and base at the
        same paths

    Returns
    -------
    One line for each run that failed.
    """
    if not settings.data.is_dir():
        raise ScheduleError(f"--data {settings.data}: no such folder")
    left = [task for task in tasks if not finished(task.path(settings.out))]
    log.info("%d runs, %d of them done before", len(tasks), len(tasks) - len(left))
    if ray is not None:
        return _over_ray(left, settings, ray)
    failed = []
    # Spawned: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or os.cpu_count() or 1, mp_context=context) as pool:
        waiting = {pool.submit(work, task, settings): task for task in left}
        for count, future in enumerate(as_completed(waiting), 1):
            task = waiting[future]
            try:
                log.info("%d of %d: %s", count, len(left), future.result())
            except Exception as error:  # a run that fails must not end the others
                log.error("%s failed:\n%s", task.name, traceback.format_exc())
                failed.append(f"{task.name}: {type(error).__name__}: {error}")
    return failed


def _over_ray(tasks: Sequence[Task], settings: Settings, address: str) -> list[str]:
    try:
        import ray
    except ImportError as error:
        raise ScheduleError("--ray: the package ray is not installed (pip install ray)") from error
    try:
        ray.init(address=None if address == "local" else address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ScheduleError(f"--ray {address}: no cluster there: {first}") from error
    places = {name: getattr(settings, name).resolve() for name in ("data", "base", "out")}
    here = replace(settings, **places)
    gpus = 0 if settings.device == "cpu" else SHARE
    remote: Any = ray.remote(num_cpus=1, num_gpus=gpus)(work)
    waiting = {remote.remote(task, here): task for task in tasks}
    failed, left = [], list(waiting)
    while left:
        (done,), left = ray.wait(left, num_returns=1)
        try:
            log.info("%d left: %s", len(left), ray.get(done))
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            failed.append(f"{waiting[done].name}: {last}")
    ray.shutdown()
    return failed

"""The store of a scenario, built once per checkpoint and settings: `python -m export.build` for every profile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import device_profiles
from lab.processes import Processes
from lab.scenario import Artifact
from protocol.manifest import sha256_file

ROOT = Path(__file__).parents[1]
_SOURCES = ("export", "protocol", "device_profiles")


class ArtifactError(ValueError):
    """A store that cannot be built. One line."""


def key(base: Path, artifact: Artifact, steps: int, profiles: dict[str, float]) -> str:
    """Hash of all that the store is made from: checkpoint, shape, profiles, scales, the code that builds it."""
    digest = hashlib.sha256()
    settings = {"artifact": asdict(artifact), "steps": steps, "profiles": profiles}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    files = [p for p in base.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors")]
    for folder in _SOURCES:
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".toml")]
    files += [Path(name) for name in profiles if Path(name).is_file()]
    for path in sorted(files):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()[:16]


def _commands(
    base: Path, artifact: Artifact, steps: int, profiles: dict[str, float], out: Path, at_once: int
) -> Iterator[tuple[str, list[str]]]:
    """(name, command) of `at_once` builders.

    A builder lowers a shape once, and profiles of the same budget mostly have the same shape: they go to one builder.
    """
    by_budget: dict[int, list[str]] = {}
    for profile, scale in profiles.items():
        budget = int(device_profiles.load(profile).budget_bytes * scale)
        by_budget.setdefault(budget, []).append(profile)
    hands: list[list[str]] = [[] for _ in range(min(at_once, len(by_budget)))]
    for index, budget in enumerate(sorted(by_budget, reverse=True)):
        hands[index % len(hands)] += by_budget[budget]
    shape = ["--steps", str(steps)]
    for flag in ("rank", "sequence", "batch", "answers"):
        shape += [f"--{flag}", str(getattr(artifact, flag))]
    for index, names in enumerate(hands):
        chosen = []
        for name in names:
            chosen += ["--profile", name, "--scale-budget", str(profiles[name])]
        # The lab's server never asks for a profile of the whole model.
        command = ["export.build", "--checkpoint", str(base), "--out", str(out), "--no-profiling"]
        command += [*shape, *chosen]
        yield f"build-{index}", command


def _key_to_sign(processes: Processes, cache: Path) -> Path:
    """The lab's own key, made on first use. Devices are told the public half, as an owner would."""
    secret = cache / "lab.key"
    if not secret.is_file():
        made = processes.start("keys", ["export.keys", "--out", str(cache / "lab")])
        while made.ended is None:
            time.sleep(0.05)
        if made.ended != 0:
            raise ArtifactError(made.last_words() or made.failure())
    return secret


def build(
    processes: Processes,
    base: Path,
    artifact: Artifact,
    steps: int,
    profiles: dict[str, float],
    cache: Path,
    at_once: int,
) -> tuple[Path, bool]:
    """Build the store below `cache`, or find it there.

    Parameters
    ----------
    steps : of a round; the planner has an eye on its time
    profiles : profile -> scale of its budget
    at_once : int
        Builders that run side by side, each with its share of the profiles.

    Returns
    -------
    (store, built) : the folder, and whether it had to be built

    Raises
    ------
    ArtifactError
        With the builder's own line: a budget that is too small, a checkpoint that is no MoE.
    """
    try:
        store = cache / f"store-{key(base, artifact, steps, profiles)}"
    except OSError as error:
        raise ArtifactError(f"{base}: cannot be read: {error.strerror}") from error
    if store.is_dir():
        return store, False
    partial = cache / f"{store.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    secret = _key_to_sign(processes, cache)
    running = [
        processes.start(
            name, [*command, "--sign", str(secret)], environment={"OMP_NUM_THREADS": "1"}
        )
        for name, command in _commands(base, artifact, steps, profiles, partial, at_once)
    ]
    while running:
        done = next((child for child in running if child.ended is not None), None)
        if done is None:
            time.sleep(0.1)
            continue
        running.remove(done)
        if done.ended != 0:
            processes.stop(*(child.name for child in running))
            raise ArtifactError(done.last_words() or done.failure())
    os.replace(partial, store)
    return store, True

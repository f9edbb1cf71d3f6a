"""Cut, quantise and lower the sub-MoE that fits a device.

    python -m export.build --profile jetson_orin --out store
    python -m export.build --checkpoint DIR_OR_HUB_ID --profile pixel_8 --profile jetson_orin --out store

Writes STORE/base.json, STORE/blobs/ and STORE/<profile>/manifest.json; artifacts in one store share their blobs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import device_profiles
from device_profiles import DeviceProfile, ProfileError
from export import families, plan
from export.blob_store import BlobStore, write_atomically
from export.checkpoint import Checkpoint, CheckpointError, locate
from export.families import FamilyError
from export.programs import lower_programs
from export.slice_base import FORMATS, slice_base
from protocol import PROTOCOL_VERSION, manifest, packing
from protocol.manifest import BaseIndex, Manifest, ManifestError, Shape
from reference_base import MODEL_DIR

log = logging.getLogger(__name__)
Advance = Callable[[str], None]


class ExpertsError(ValueError):
    """A file of expert statistics or of a selection that does not fit the base."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the command line may overrule of a profile; None leaves it."""

    rank: int | None = None
    sequence: int | None = None
    batch: int | None = None
    answers: int = 4
    scale_budget: float = 1.0


def build(
    base: BaseIndex,
    profile: DeviceProfile,
    out: Path,
    choices: Choices,
    experts: dict[str, Any] | None,
    advance: Advance,
) -> Manifest:
    """Choose and lower the sub-MoE of a sliced base that fits `profile`; write it to `out`.

    Parameters
    ----------
    experts : dict or None
        {"layers": {"0": [3, 7]}} selects experts, {"mass": [[...]]} gives routing mass [L, E] to choose by;
        None chooses by the base's own routing prior.

    Raises
    ------
    ExpertsError, plan.DoesNotFit, ManifestError
    """
    family, store = families.of(base.config, str(out)), BlobStore(out)
    _same_base(out, base)
    budget = int(profile.budget_bytes * choices.scale_budget)
    shape, chosen = _shape(base, profile, choices, experts, budget)
    while True:
        programs = lower_programs(base, family, shape, store, advance)
        memory = plan.memory(programs.train, programs.evaluate, shape, base.vocabulary, budget)
        if memory.predicted <= budget:
            break
        chooses = experts is None or "mass" in experts
        smaller = (
            plan.next_lower(_mass(base, experts), base.top_k, shape.slots) if chooses else None
        )
        if smaller is None:
            raise plan.DoesNotFit(
                f"{profile.name}: {sum(shape.slots)} experts need {memory.predicted / 2**20:.1f} MB, "
                f"the budget is {budget / 2**20:.1f} MB (try a smaller --batch, --sequence or --rank)"
            )
        shape = replace(shape, slots=smaller)
        chosen = plan.choose_experts(_mass(base, experts), smaller)
    artifact = Manifest(
        protocol=PROTOCOL_VERSION,
        base=base.base,
        profile=profile.name,
        shape=shape,
        train=programs.train,
        evaluate=programs.evaluate,
        dense=base.dense,
        tokenizer=base.tokenizer,
        memory=memory,
        experts={str(layer): ids for layer, ids in zip(base.moe_layers, chosen, strict=True)},
    )
    write_atomically(out / "base.json", manifest.to_json(base))
    # The manifest comes last: no manifest, no artifact.
    write_atomically(out / profile.name / "manifest.json", manifest.to_json(artifact))
    return artifact


def _same_base(out: Path, base: BaseIndex) -> None:
    path = out / "base.json"
    if path.exists() and manifest.read_base(path).base != base.base:
        raise ManifestError(f"{out}: holds the slices of another base, choose a new --out")


def _mass(base: BaseIndex, experts: dict[str, Any] | None) -> NDArray[np.float64]:
    """Routing mass [L, E], rows sum to 1: measured where given, else the base's prior."""
    if experts is None:
        return np.asarray(base.routing_prior, dtype=np.float64)
    mass = np.asarray(experts["mass"], dtype=np.float64)
    if mass.shape != (len(base.moe_layers), base.num_experts) or not (mass >= 0).all():
        raise ExpertsError(
            f"experts: mass of shape {list(mass.shape)} found, "
            f"[{len(base.moe_layers)}, {base.num_experts}] of numbers >= 0 wanted"
        )
    return mass / np.maximum(mass.sum(1, keepdims=True), 1e-12)


def _shape(
    base: BaseIndex,
    profile: DeviceProfile,
    choices: Choices,
    experts: dict[str, Any] | None,
    budget: int,
) -> tuple[Shape, list[tuple[int, ...]]]:
    """The shape within `budget` and the experts that fill it."""
    shape = Shape(
        batch=choices.batch or profile.batch,
        sequence=choices.sequence or profile.sequence,
        answers=choices.answers,
        rank=choices.rank or profile.rank,
        group=base.group,
        slots=(base.top_k,) * len(base.moe_layers),
    )
    longest = int(base.config.get("max_position_embeddings", shape.sequence))
    if shape.sequence > longest:
        raise ExpertsError(f"--sequence {shape.sequence}: the base reads at most {longest} tokens")
    if not 1 <= shape.answers < shape.sequence:
        raise ExpertsError(f"--answers {shape.answers}: 1 to {shape.sequence - 1} wanted")
    if experts is not None and "layers" in experts:
        chosen = _selection(base, experts["layers"])
        return replace(shape, slots=tuple(len(ids) for ids in chosen)), chosen
    mass = _mass(base, experts)
    try:
        slots = plan.choose_slots(
            mass, base.top_k, lambda s: plan.estimate(base, replace(shape, slots=s)) <= budget
        )
    except plan.DoesNotFit as error:
        need = plan.estimate(base, shape) / 2**20
        raise plan.DoesNotFit(
            f"{profile.name}: {error}: about {need:.1f} MB needed, the budget is "
            f"{budget / 2**20:.1f} MB (try a smaller --batch, --sequence or --rank)"
        ) from error
    return replace(shape, slots=slots), plan.choose_experts(mass, slots)


def _selection(base: BaseIndex, layers: dict[str, Any]) -> list[tuple[int, ...]]:
    """An explicit selection, checked."""
    wanted = [str(layer) for layer in base.moe_layers]
    if sorted(layers) != sorted(wanted):
        raise ExpertsError(f"experts: layers {', '.join(layers)} found, {', '.join(wanted)} wanted")
    chosen = []
    for layer in wanted:
        ids = layers[layer]
        good = isinstance(ids, list) and all(
            isinstance(e, int) and 0 <= e < base.num_experts for e in ids
        )
        if not good or len(set(ids)) != len(ids) or len(ids) < base.top_k:
            raise ExpertsError(
                f"experts: layer {layer}: at least {base.top_k} different ids "
                f"from 0 to {base.num_experts - 1} wanted"
            )
        chosen.append(tuple(sorted(ids)))
    return chosen


def _read_experts(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ExpertsError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ExpertsError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict) or not ({"layers", "mass"} & set(value)):
        raise ExpertsError(f'{path}: a table with "layers" or "mass" wanted')
    return value


def _summary(console: Console, base: BaseIndex, artifact: Manifest) -> None:
    """What was kept, what it weighs and whether it fits."""
    memory, shape = artifact.memory, artifact.shape
    table = Table(title=f"{artifact.profile}: {sum(shape.slots)} experts", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("experts", justify="right")
    table.add_column("kept")
    weight = 0
    for position, layer in enumerate(base.moe_layers):
        ids = artifact.experts[str(layer)]
        weight += sum(base.experts[position][e].bytes for e in ids)
        kept = " ".join(map(str, ids))
        table.add_row(str(layer), f"{len(ids)} of {base.num_experts}", kept)
    console.print(table)
    mb = 2**20
    console.print(
        f"download: experts {weight / mb:.1f} MB, dense {base.dense.bytes / mb:.1f} MB, programs "
        f"{(artifact.train.blob.bytes + artifact.evaluate.blob.bytes) / mb:.1f} MB"
    )
    console.print(
        f"predicted peak {memory.predicted / mb:.1f} MB of {memory.budget / mb:.1f} MB: arena "
        f"{memory.arena / mb:.1f}, weights and batch {memory.inputs / mb:.1f}, adapter "
        f"{memory.parameters / mb:.1f}, optimizer {memory.optimizer / mb:.1f}, "
        f"outputs and runtime {(memory.outputs + memory.runtime) / mb:.1f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.build",
        description=__doc__.splitlines()[0],
        epilog="example: python -m export.build --profile jetson_orin --out store",
    )
    parser.add_argument(
        "--profile", action="append", required=True, help="name or TOML path; repeatable"
    )
    parser.add_argument(
        "--checkpoint",
        default=str(MODEL_DIR),
        help="directory or hub id (default: the reference base)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("store"), help="store directory (default: %(default)s)"
    )
    parser.add_argument(
        "--formats",
        default=",".join(FORMATS),
        help="formats that experts and dense are stored in, of int4,nf4,int8 (default: %(default)s)",
    )
    parser.add_argument("--experts", type=Path, help="JSON with routing mass or a selection")
    parser.add_argument("--rank", type=int, help="LoRA rank (default: the profile's)")
    parser.add_argument("--sequence", type=int, help="tokens per row (default: the profile's)")
    parser.add_argument("--batch", type=int, help="rows per step (default: the profile's)")
    parser.add_argument(
        "--answers", type=int, default=4, help="scored tokens per row (default: %(default)s)"
    )
    parser.add_argument(
        "--scale-budget",
        type=float,
        action="append",
        help="multiply the profile's memory budget; once for all profiles or once for each",
    )
    return parser


def _formats(given: str) -> tuple[str, ...]:
    """The formats of `--formats`, each once."""
    formats = tuple(dict.fromkeys(given.split(",")))
    if unknown := set(formats) - set(packing.FORMATS):
        raise ExpertsError(
            f"--formats {','.join(sorted(unknown))}: of {', '.join(packing.FORMATS)} wanted"
        )
    return formats


def _scales(given: list[float] | None, profiles: int) -> list[float]:
    """One budget factor per profile."""
    scales = given or [1.0]
    if len(scales) == 1:
        scales = scales * profiles
    if len(scales) != profiles:
        raise ExpertsError(f"--scale-budget given {len(scales)} times for {profiles} profiles")
    if not all(0 < scale < 1e6 for scale in scales):
        raise ExpertsError(f"--scale-budget {min(scales)}: a positive number wanted")
    return scales


@contextlib.contextmanager
def _bar(console: Console, name: str, stages: int) -> Iterator[Advance]:
    """A progress bar; calling what it gives ends a stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=stages)
        yield lambda stage: progress.update(task, advance=1, description=f"{name}: {stage}")
        progress.update(task, completed=stages, description=f"{name}: done")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the artifacts' paths last."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    console = Console(stderr=True)
    try:
        for name in ("rank", "sequence", "batch", "answers"):
            value = getattr(args, name)
            if value is not None and not 0 < value < 1e6:
                raise ExpertsError(f"--{name} {value}: a positive number wanted")
        profiles = [device_profiles.load(name) for name in args.profile]
        scales = _scales(args.scale_budget, len(profiles))
        experts = _read_experts(args.experts)
        checkpoint = Checkpoint(locate(args.checkpoint))
        family = families.of(checkpoint.config, str(checkpoint.path))
        config = families.complete(checkpoint.config, str(checkpoint.path))
        # Once for all profiles: their artifacts share the blobs.
        with _bar(console, "base", len(family.moe_layers(config)) + 1) as advance:
            base = slice_base(
                checkpoint, family, BlobStore(args.out), advance, _formats(args.formats)
            )
        for profile, scale in zip(profiles, scales, strict=True):
            choices = Choices(
                rank=args.rank,
                sequence=args.sequence,
                batch=args.batch,
                answers=args.answers,
                scale_budget=scale,
            )
            with _bar(console, profile.name, 2) as advance:
                artifact = build(base, profile, args.out, choices, experts, advance)
            _summary(console, base, artifact)
            print(args.out / profile.name, flush=True)
    except (
        CheckpointError,
        ExpertsError,
        FamilyError,
        ManifestError,
        ProfileError,
        plan.DoesNotFit,
        OSError,
    ) as error:
        print(f"export.build: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

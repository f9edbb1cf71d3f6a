"""Cut, quantise and lower the sub-MoE that fits a device.

    python -m export.build --profile jetson_orin --out store
    python -m export.build --checkpoint DIR_OR_HUB_ID --profile pixel_8 --profile jetson_orin --out store
    python -m export.build --checkpoint DENSE --adapter-experts 8 --adapter-top-k 2 --profile pixel_8 --out store

Writes STORE/base.json, STORE/blobs/ and STORE/<profile>/manifest.json; artifacts in one store share their blobs. What
an interrupted build has sliced is not sliced again. With --sign KEY devices can tell that the artifacts are yours.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import device_profiles
from device_profiles import DeviceProfile, ProfileError
from export import costs, experts_file, explain, families, plan
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint, CheckpointError, locate
from export.experts_file import ExpertsError
from export.families import FamilyError, fft_moe
from export.families.family import Family
from export.items import Values
from export.keys import KeyFileError, read_private
from export.plan import Choices, Plan
from export.profile_programs import lower_profiling, predicted
from export.programs import Programs, lower_programs
from export.publish import check_key, publish
from export.slice_base import FORMATS, slice_base
from protocol import PROTOCOL_VERSION, manifest, packing
from protocol.manifest import BaseIndex, Manifest, ManifestError, MemoryPlan, Profiling
from reference_base import MODEL_DIR

log = logging.getLogger(__name__)
Advance = Callable[[str], None]


def build(
    base: BaseIndex,
    profile: DeviceProfile,
    out: Path,
    choices: Choices,
    values: Values,
    advance: Advance,
    key: Ed25519PrivateKey | None = None,
    profiling: bool = True,
) -> tuple[Manifest, Plan]:
    """Choose and lower the sub-MoE of a sliced base that fits `profile`; write it to `out`.

    With `profiling`, also the programs for a profile of the whole model.

    Raises
    ------
    ExpertsError, plan.DoesNotFit, ManifestError
    """
    family, store = families.of(base.config, str(out)), BlobStore(out)
    _same_base(out, base)
    _check_length(base, profile, choices)
    chosen, programs, memory = _lowered(base, family, profile, choices, values, store, advance)
    artifact = Manifest(
        protocol=PROTOCOL_VERSION,
        base=base.base,
        profile=profile.name,
        shape=chosen.shape,
        train=programs.train,
        evaluate=programs.evaluate,
        dense=base.dense[chosen.shape.dense],
        tokenizer=base.tokenizer,
        memory=memory,
        experts={
            str(layer): ids for layer, ids in zip(base.moe_layers, chosen.experts, strict=True)
        },
        profiling=(
            _profiling(base, family, profile.name, chosen, store, advance) if profiling else None
        ),
    )
    # The manifest comes last: no manifest, no artifact.
    return publish(out, base, artifact, key), chosen


def _lowered(
    base: BaseIndex,
    family: Family,
    profile: DeviceProfile,
    choices: Choices,
    values: Values,
    store: BlobStore,
    advance: Advance,
) -> tuple[Plan, Programs, MemoryPlan]:
    """The most valuable plan whose lowered programs fit. What the estimate missed is reserved in the next try."""
    dense, reserve = costs.dense_of(base), 0
    while True:
        chosen = plan.choose(base, dense, profile, choices, values, reserve)
        programs = lower_programs(base, family, chosen.shape, store, advance)
        budget = chosen.budget.memory
        memory = costs.memory(base, dense, programs.train, programs.evaluate, chosen.shape, budget)
        if memory.predicted <= budget:
            break
        reserve += max(memory.predicted - chosen.memory.predicted, 1 << 20)
    flash = sum(
        (
            chosen.flash | {"programs": programs.train.blob.bytes + programs.evaluate.blob.bytes}
        ).values()
    )
    if flash > chosen.budget.limits[1]:
        raise plan.DoesNotFit(
            f"{profile.name}: {flash / 2**20:.1f} MB of flash needed, "
            f"the budget is {chosen.budget.limits[1] / 2**20:.1f} MB"
        )
    return chosen, programs, memory


def _profiling(
    base: BaseIndex,
    family: Family,
    name: str,
    chosen: Plan,
    store: BlobStore,
    advance: Advance,
) -> Profiling | None:
    """The programs that profile the whole model, if there are any for this base that fit the budget."""
    try:
        made = lower_profiling(base, family, chosen.shape, store, advance)
    except FamilyError as error:
        log.warning("%s: devices only profile the experts they hold: %s", name, error)
        return None
    needed = sum(predicted(made, chosen.shape, base).values())
    if needed > chosen.budget.memory:
        log.warning(
            "%s: devices only profile the experts they hold: the whole model needs %.1f MB of %.1f",
            *(name, needed / 2**20, chosen.budget.memory / 2**20),
        )
        return None
    return made


def _same_base(out: Path, base: BaseIndex) -> None:
    path = out / "base.json"
    if path.exists() and manifest.read_base(path).base != base.base:
        raise ManifestError(f"{out}: holds the slices of another base, choose a new --out")


def _check_length(base: BaseIndex, profile: DeviceProfile, choices: Choices) -> None:
    sequence = choices.sequence or profile.sequence
    longest = int(base.config.get("max_position_embeddings", sequence))
    if sequence > longest:
        raise ExpertsError(f"--sequence {sequence}: the base reads at most {longest} tokens")
    if not 1 <= choices.answers < sequence:
        raise ExpertsError(f"--answers {choices.answers}: 1 to {sequence - 1} wanted")


def _summary(console: Console, base: BaseIndex, artifact: Manifest, chosen: Plan) -> None:
    """What was kept, what it weighs and whether it fits."""
    memory, shape = artifact.memory, artifact.shape
    kept = sum(map(len, shape.slots))
    table = Table(title=f"{artifact.profile}: {kept} experts", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("experts", justify="right")
    table.add_column("slots")
    table.add_column("kept")
    for layer, slots in zip(base.moe_layers, shape.slots, strict=True):
        ids = artifact.experts[str(layer)]
        counts = f"{len(ids)} of {base.num_experts}"
        table.add_row(str(layer), counts, explain.describe(slots), " ".join(map(str, ids)))
    console.print(table)
    mb, flash = 2**20, chosen.flash
    console.print(
        f"{shape.batch} x {shape.sequence} tokens; download: experts {flash['experts'] / mb:.1f} MB, "
        f"dense {shape.dense} {artifact.dense.bytes / mb:.1f} MB, programs "
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
        help="formats that experts and dense are stored in, of int4,nf4,int8 "
        f"(default: those that the store has, or {','.join(FORMATS)})",
    )
    parser.add_argument(
        "--sign", type=Path, metavar="KEY", help="sign with this key (see python -m export.keys)"
    )
    parser.add_argument("--jobs", type=int, help="threads that slice (default: the cores)")
    parser.add_argument(
        "--adapter-experts",
        type=int,
        metavar="M",
        help="beside every block of a dense checkpoint train M small experts (FFT-MoE); their width is the rank",
    )
    parser.add_argument(
        "--adapter-top-k",
        type=int,
        metavar="K",
        help="adapter experts that a token uses (default: 2, or 1 where M is 1)",
    )
    parser.add_argument("--experts", type=Path, help="JSON with routing mass or a selection")
    parser.add_argument(
        "--theta",
        type=float,
        default=Choices.theta,
        help="share of the routing that the kept experts of each layer carry, if it fits (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=Choices.steps, help="of a round (default: %(default)s)"
    )
    parser.add_argument(
        "--deadline", type=float, help="seconds that a round may take (default: the profile's)"
    )
    parser.add_argument(
        "--uplink-mb", type=float, help="MB that a round may send (default: the profile's)"
    )
    parser.add_argument(
        "--explain", action="store_true", help="print where every byte and second goes"
    )
    parser.add_argument("--rank", type=int, help="LoRA rank (default: the profile's)")
    parser.add_argument("--sequence", type=int, help="tokens per row (default: the profile's)")
    parser.add_argument("--batch", type=int, help="rows per step (default: the profile's)")
    parser.add_argument(
        "--answers", type=int, default=4, help="scored tokens per row (default: %(default)s)"
    )
    parser.add_argument(
        "--profiling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="programs for the server's --profile full (default: with them; without is faster)",
    )
    parser.add_argument(
        "--scale-budget",
        type=float,
        action="append",
        help="multiply the profile's memory budget; once for all profiles or once for each",
    )
    return parser


def _add_experts(checkpoint: Checkpoint, experts: int | None, top_k: int | None) -> None:
    """Ask for adapter experts beside the blocks of a dense checkpoint; raises FamilyError."""
    if experts is None:
        if top_k is not None:
            raise ExpertsError("--adapter-top-k is for --adapter-experts")
        return
    used = min(2, experts) if top_k is None else top_k
    where = str(checkpoint.path)
    checkpoint.config = fft_moe.with_experts(checkpoint.config, experts, used, where)


def _formats(given: str | None) -> tuple[str, ...] | None:
    """The formats of `--formats`, each once."""
    if given is None:
        return None
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
        for name in (
            *("rank", "sequence", "batch", "answers"),
            *("steps", "deadline", "uplink_mb", "jobs"),
        ):
            value = getattr(args, name)
            if value is not None and not 0 < value < 1e6:
                flag = name.replace("_", "-")
                raise ExpertsError(f"--{flag} {value}: a positive number wanted")
        if not 0 <= args.theta <= 1:
            raise ExpertsError(f"--theta {args.theta}: 0 to 1 wanted")
        profiles = [device_profiles.load(name) for name in args.profile]
        scales = _scales(args.scale_budget, len(profiles))
        experts = experts_file.read(args.experts)
        key = None if args.sign is None else read_private(args.sign)
        check_key(args.out, key)
        checkpoint = Checkpoint(locate(args.checkpoint))
        _add_experts(checkpoint, args.adapter_experts, args.adapter_top_k)
        family = families.of(checkpoint.config, str(checkpoint.path))
        config = families.complete(checkpoint.config, str(checkpoint.path))
        # Once for all profiles: their artifacts share the blobs.
        with _bar(console, "base", len(family.moe_layers(config)) + 1) as advance:
            base = slice_base(
                checkpoint, family, BlobStore(args.out), advance, _formats(args.formats), args.jobs
            )
        for profile, scale in zip(profiles, scales, strict=True):
            choices = Choices(
                rank=args.rank,
                sequence=args.sequence,
                batch=args.batch,
                answers=args.answers,
                theta=args.theta,
                steps=args.steps,
                deadline=args.deadline,
                uplink_mb=args.uplink_mb,
                scale_budget=scale,
            )
            values = experts_file.values(base, experts)
            with _bar(console, profile.name, 3) as advance:
                artifact, chosen = build(
                    base, profile, args.out, choices, values, advance, key, args.profiling
                )
            _summary(console, base, artifact, chosen)
            if args.explain:
                rank = choices.rank or profile.rank
                for table in explain.tables(base, artifact, chosen, values, rank):
                    console.print(table)
            print(args.out / profile.name, flush=True)
    except (
        CheckpointError,
        ExpertsError,
        FamilyError,
        KeyFileError,
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

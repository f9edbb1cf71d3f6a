"""The main path of a device: register, get a lease, fetch, work, put into the outbox, deliver, and again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from edge import data, feedback, kept, profiling, slots, trainer
from edge.deliver import Delivery, SendOffer
from edge.fetch import BlobCache, FetchError, Server
from edge.identity import Identity
from edge.kept import Kept
from edge.limits import MIB, MemoryLimit, OverBudgetError
from edge.link import Connected, Event, Link
from edge.outbox import Outbox, Parcel
from edge.session import Artifact, Backend, FloatArrays, SessionError, load_backend
from edge.trust import Trust
from protocol import chunks, messages, tensors, topics, update
from protocol.manifest import BaseIndex, ManifestError, Shape, check_fits

log = logging.getLogger(__name__)
READY_EVERY = 5.0
WARM_ROWS = 5000
LOST = 20.0
"""Seconds without a broker after which the server is asked where it is now."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    server: str
    profile: str
    data: Path
    text: str
    label: str | None
    device: str | None
    workdir: Path
    backend: str
    budget_bytes: int | None
    enforce: str
    held_back: int
    once: bool
    trust: Path | None = None
    keep_bytes: int = 0


@dataclass
class Device:
    """Everything that lives as long as the process."""

    options: Options
    identity: Identity
    server: Server
    cache: BlobCache
    outbox: Outbox
    rows: list[data.Row]
    backend: Backend
    trust: Trust
    kept: Kept
    limit: MemoryLimit | None = None
    counted_down: int = 0
    finished: set[str] = field(default_factory=set)


@dataclass
class Attendance:
    """One run of one server, as long as both stay what they are."""

    welcome: messages.Welcome
    artifact: Artifact
    prompts: data.Prompter
    link: Link
    next_lease: messages.Lease | None = None
    over: bool = False
    moved: bool = False


def run(options: Options) -> None:
    """Take part in a server's run until it is over. Boundary errors are raised, see `edge.__main__`."""
    rows = data.read_rows(options.data, options.text, options.label)
    train_rows, _ = data.split_rows(rows)
    if not train_rows:
        raise data.DataError(
            f"{options.data}: {len(rows)} rows, all of them held back: none to train on"
        )
    server = Server(options.server)
    with Identity(options.workdir, options.device, options.profile, server.url) as identity:
        trust = Trust(options.workdir, options.trust)
        cache = BlobCache(server, options.workdir / "blobs", options.keep_bytes)
        outbox = Outbox(options.workdir / "outbox")
        keeps = Kept(options.workdir)
        device: Device | None = None
        while True:
            welcome = server.register(
                identity.device, options.profile, identity.token, len(train_rows)
            )
            identity.remember(welcome.token)
            data.check_labels(rows, welcome.task, str(options.data))
            if device is None:
                backend = load_backend(options.backend)
                device = Device(
                    options, identity, server, cache, outbox, rows, backend, trust, keeps
                )
            log.info("device=%s run=%s profile=%s", identity.device, welcome.run, options.profile)
            artifact, prompts = prepare(device, welcome)
            with Link(welcome.broker, welcome.fleet, identity.device) as link:
                here = Attendance(welcome, artifact, prompts, link)
                attend(device, here)
            if not here.moved:
                return


def prepare(device: Device, welcome: messages.Welcome) -> tuple[Artifact, data.Prompter]:
    """Indices, program and dense blobs, tokenizer: what every lease needs."""
    base = device.server.base(device.trust)
    manifest = device.server.manifest(device.options.profile, device.trust)
    if base.base != welcome.base or manifest.base != welcome.base:
        raise FetchError(
            f"{device.server.url}: artifact of base {manifest.base[:12]} in a run of {welcome.base[:12]}"
        )
    try:
        check_fits(manifest, base, f"{device.server.url}: manifest of {manifest.profile}")
    except ManifestError as error:
        raise FetchError(str(error)) from error
    artifact = Artifact(base, manifest, device.cache.folder)
    for blob in (manifest.tokenizer, manifest.dense):
        device.cache.get(blob)
    if device.backend.name == "executorch":
        for program in (manifest.train, manifest.evaluate):
            device.cache.get(program.blob)
    shape = manifest.shape
    prompts = data.prompter(
        read_tokenizer(artifact.path(manifest.tokenizer)),
        welcome.task,
        shape.batch,
        shape.sequence,
        shape.answers,
        base,
    )
    # The tokenizer remembers the words it has met. It meets them now: they belong to the process, not to a lease.
    for row in device.rows[:WARM_ROWS]:
        prompts.row(row, None)
    # So do the libraries that coding an update needs: 1.4 MiB of LAPACK.
    feedback.warm()
    if device.limit is None:
        budget = device.options.budget_bytes or manifest.memory.budget
        device.limit = MemoryLimit(budget, device.options.enforce)
    return artifact, prompts


def read_tokenizer(path: Path) -> data.Tokenizer:
    """A `tokenizer.json`; raises FetchError."""
    try:
        tokenizer: Any = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises nothing more specific
        raise FetchError(f"{path}: no tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    kept: data.Tokenizer = tokenizer
    return kept


def attend(device: Device, here: Attendance) -> None:
    """Deliver what is left from before; then lease after lease, until the run is over or has moved."""
    for parcel in device.outbox.waiting():
        if parcel.run == here.welcome.run:
            deliver(device, here, parcel)
        else:
            log.warning("lease=%s of run %s, which is gone: dropped", parcel.lease, parcel.run)
            device.outbox.remove(parcel.lease)
    while not here.over and not here.moved:
        lease = wait_for_lease(device, here)
        if lease is None:
            continue
        parcel_or_none = fulfil(device, here, lease)
        if parcel_or_none is not None:
            deliver(device, here, parcel_or_none)
            if device.options.once:
                return


def absorb(device: Device, here: Attendance, event: Event | None) -> None:
    """Take note of what concerns the run as a whole."""
    run = here.welcome.run
    if isinstance(event, messages.RunOver) and event.run == run:
        here.over = True
    elif isinstance(event, messages.RoundInfo):
        if event.run != run:
            here.moved = True
    elif isinstance(event, messages.Lease):
        if event.run != run:
            here.moved = True
        elif topics.ID.fullmatch(event.lease) and event.lease not in device.finished:
            here.next_lease = event
    if here.link.lost_for() > LOST:
        here.moved = True


def wait_for_lease(device: Device, here: Attendance) -> messages.Lease | None:
    """Say Ready until a lease comes; None when the run is over or has moved."""
    said = float("-inf")
    while here.next_lease is None:
        if here.over or here.moved:
            return None
        event = here.link.next_event(0.2)
        absorb(device, here, event)
        if isinstance(event, Connected) or time.monotonic() - said > READY_EVERY:
            said = time.monotonic()
            here.link.say(messages.Ready(device=device.identity.device, run=here.welcome.run))
    lease, here.next_lease = here.next_lease, None
    return lease


def fulfil(device: Device, here: Attendance, lease: messages.Lease) -> Parcel | None:
    """Fetch, work, pack; the update is on disk when this returns. None when there is nothing to send."""
    started = time.monotonic()
    log.info(
        "round=%d lease=%s work=%s steps=%d", lease.round, lease.lease, lease.work, lease.steps
    )
    device.finished.add(lease.lease)

    def check() -> None:
        while (event := here.link.next_event(0)) is not None:
            absorb(device, here, event)
        if here.over or (here.next_lease is not None and here.next_lease.lease != lease.lease):
            raise trainer.Abandoned

    base, shape = here.artifact.base, here.artifact.manifest.shape
    try:
        job = job_of(lease, base, shape)
        for blob in slots.blobs_of(base, shape, job.resident):
            device.cache.get(blob)
        wanted = slots.adapter_shapes(base, shape, job.resident)
        adapter, shared = slots.split_adapter(read_adapter(device, lease), wanted, base)
        log.info(
            "lease=%s fetched, %.2f MB down so far", lease.lease, device.cache.bytes_down / 1e6
        )
        # What coding owes is as large as the adapter, and training has no use for it.
        own = device.kept.read(lease.run, without=(feedback.RESIDUAL, feedback.BASIS))
        result, limit = work(device, here, lease, job, adapter, check, shared, own)
        own = device.kept.read(lease.run)
        sent, owed = code(result, adapter, own, lease.uplink)
    except trainer.Abandoned:
        log.warning("lease=%s is no longer wanted: given up", lease.lease)
        return None
    except (slots.SlotError, tensors.TensorError, trainer.TrainingError) as error:
        log.error("lease=%s cannot be fulfilled: %s", lease.lease, error)
        return None
    facts = facts_of(device, result, limit, time.monotonic() - started)
    body = update.pack(sent, result.stats, facts)
    log.info(
        "round=%d lease=%s loss %.3f -> %.3f accuracy %.3f -> %.3f peak %.1f MiB of %.1f, update %.2f MB, %.1f s",
        lease.round,
        lease.lease,
        *(facts.loss_before, facts.loss_after, facts.accuracy_before, facts.accuracy_after),
        *(facts.peak_bytes / MIB, facts.budget_bytes / MIB, len(body) / 1e6, facts.seconds),
    )
    parcel = device.outbox.put(lease.lease, lease.run, lease.nonce, body)
    keep(device, lease, own, {**result.kept, **owed})
    return parcel


def job_of(lease: messages.Lease, base: BaseIndex, shape: Shape) -> trainer.Job:
    """What a lease asks of training; raises SlotError when it does not fit the slots."""
    resident = slots.resident_of(lease.resident, base.moe_layers, shape.slots, base.num_experts)
    return trainer.Job(
        work=lease.work,
        resident=resident,
        trained=slots.trained_of(lease.trained, resident, shape.slots),
        steps=lease.steps,
        learning_rate=lease.learning_rate,
        router_learning_rate=lease.router_learning_rate,
        seed=lease.seed,
        objective=lease.objective,
    )


def read_adapter(device: Device, lease: messages.Lease) -> dict[str, Any]:
    """The adapter slice of a lease, in float32."""
    blob = lease.adapter
    found = tensors.decode(device.cache.get(blob).read_bytes(), blob.bytes)
    return tensors.widened(found) if lease.downlink == "float16" else found


def code(
    result: trainer.Result,
    adapter: FloatArrays,
    own: FloatArrays,
    kind: Literal["float32", "int8", "int4"],
) -> tuple[tensors.Tensors, FloatArrays]:
    """(tensors of the update, what of the coding's losses stays here)."""
    if kind == "float32" or not result.adapter:
        return {**result.adapter, **result.control}, {}
    change = {name: value - adapter[name] for name, value in result.adapter.items()}
    coded = feedback.code({**change, **result.control}, adapter, own, kind)
    return coded.tensors, coded.kept


def keep(device: Device, lease: messages.Lease, own: FloatArrays, new: FloatArrays) -> None:
    """Note what stays on the device. After the outbox has the update: what is kept belongs to it."""
    if not new:
        return
    try:
        device.kept.write(lease.run, kept.merged(own, new, (feedback.RESIDUAL, feedback.BASIS)))
    except OSError as error:
        log.warning("lease=%s nothing is kept for the next one: %s", lease.lease, error)


def work(
    device: Device,
    here: Attendance,
    lease: messages.Lease,
    job: trainer.Job,
    adapter: FloatArrays,
    check: Callable[[], None],
    shared: FloatArrays,
    own: FloatArrays,
) -> tuple[trainer.Result, MemoryLimit]:
    """`trainer.work` under the memory limit, and the profile of the whole model where the lease asks for it."""
    limit = device.limit
    assert limit is not None  # set by `prepare`
    train_rows, rest = data.split_rows(device.rows)
    held_back = data.first_by_hash(rest, device.options.held_back)
    whole = lease.work == "profile" and lease.profile == "full" and can_profile(device, here)
    if whole:
        job = replace(job, work="evaluate")  # accuracy is the sub-MoE's, routing the whole model's
    limit.arm()
    with limit.explained():
        result = trainer.work(
            device.backend,
            here.artifact,
            adapter,
            job,
            here.prompts,
            train_rows,
            held_back,
            check,
            shared,
            own,
        )
        if whole:
            rows = profiling.choose_rows(
                train_rows, held_back, lease.profile_rows, here.prompts.batch, job.seed
            )
            result = profiling.complete(
                result,
                lease,
                here.artifact,
                device.cache.borrow,
                here.prompts,
                rows,
                job.resident,
                device.options.workdir / "profiling",
                check,
            )
        elif lease.work == "profile" and lease.profile_clip:
            # Only the whole model's statistics are clipped row by row: none is better than bare ones.
            result = replace(result, stats={n: 0 * value for n, value in result.stats.items()})
    if limit.peak() > limit.budget:
        line = limit.message(f"{limit.peak() / MIB:.1f} MiB")
        if limit.enforce != "none":
            raise OverBudgetError(line)
        log.warning("%s (not enforced)", line)
    return result, limit


def can_profile(device: Device, here: Attendance) -> bool:
    """Whether the whole model can be run here; fetches the programs for it."""
    programs = here.artifact.manifest.profiling
    if programs is None or device.backend.name != "executorch":
        why = "artifact has no programs" if programs is None else f"{device.backend.name} backend"
        log.warning("no profile of the whole model (%s): of the resident experts instead", why)
        return False
    for program in programs.programs():
        device.cache.get(program.blob)
    return True


def facts_of(
    device: Device, result: trainer.Result, limit: MemoryLimit, seconds: float
) -> update.Facts:
    """The numbers that go with an update."""
    down = device.cache.bytes_down
    facts = update.Facts(
        rows=len(data.split_rows(device.rows)[0]),
        tokens=result.tokens,
        steps=result.steps,
        loss_first=result.losses[0],
        loss_last=result.losses[1],
        accuracy_before=result.before[1],
        accuracy_after=result.after[1],
        loss_before=result.before[0],
        loss_after=result.after[0],
        held_back_rows=result.held_back_rows,
        missed_mass=result.missed_mass,
        backend=device.backend.name,
        baseline_bytes=limit.baseline,
        peak_bytes=limit.peak(),
        budget_bytes=limit.budget,
        seconds=seconds,
        bytes_down=down - device.counted_down,
    )
    device.counted_down = down
    return facts


def deliver(device: Device, here: Attendance, parcel: Parcel) -> None:
    """Offer, send, and wait for the final receipt; then the update may go from the disk."""
    body = device.outbox.read(parcel)
    mac = messages.sign(here.welcome.token, parcel.lease, parcel.nonce, parcel.sha256, parcel.bytes)
    offer = messages.Offer(
        lease=parcel.lease,
        device=device.identity.device,
        bytes=parcel.bytes,
        sha256=parcel.sha256,
        mac=mac,
    )
    state = Delivery(parcel.lease, parcel.bytes)
    device.finished.add(parcel.lease)
    while not state.over and not here.over and not here.moved:
        now = time.monotonic()
        for xfer, index in here.link.sent():
            state.on_sent(xfer, index, now)
        for action in state.actions(now):
            if isinstance(action, SendOffer):
                here.link.say(offer)
            else:
                wire = chunks.cut(body, action.index, action.chunk_bytes)
                here.link.send_chunk(action.xfer, action.index, wire)
        event = here.link.next_event(0.02)
        absorb(device, here, event)
        if isinstance(event, messages.Grant):
            state.on_grant(event, time.monotonic())
        elif isinstance(event, messages.Receipt):
            state.on_receipt(event, time.monotonic())
        elif isinstance(event, Connected):
            here.link.forget_chunks()
            state.on_reconnected()
    if state.outcome is not None:
        if state.outcome.accepted:
            log.info("lease=%s delivered", parcel.lease)
        else:
            log.warning("lease=%s refused: %s", parcel.lease, state.outcome.reason)
        device.outbox.remove(parcel.lease)


__all__ = ["Options", "SessionError", "run"]

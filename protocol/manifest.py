"""What a base is made of and what a device of one profile downloads: two JSON files over one folder of blobs.

    STORE/base.json              BaseIndex: every (layer, expert) -> blob, dense blob, tokenizer
    STORE/<profile>/manifest.json  Manifest: the programs and the experts chosen for that profile
    STORE/base.sig, STORE/<profile>/manifest.sig  signatures, 64 bytes over the file's (Ed25519), if the store is signed
    STORE/blobs/<sha256>         program, dense, tokenizer and expert blobs, named by their content

Blobs, all safetensors; packed layouts are in `packing`. Expert, one per format: for each projection
`{projection}.packed` uint8 and `{projection}.scale` float16, of a weight [out, in] as `BaseIndex.features` says.
Dense, one per format: every other tensor of the checkpoint by its own name, a matrix as `{name}.packed` and
`{name}.scale`, anything else as `{name}` float32; plus `layers.{l}.router` float32 [E, d] for each MoE layer.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protocol import PROTOCOL_VERSION, names, packing, schema

MAX_MANIFEST = 16 << 20
MAX_COUNT = 1 << 24  # of anything that is counted: experts, tokens, features
MAX_ELEMENTS = 1 << 40
DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")


class ManifestError(ValueError):
    """A manifest or base index that cannot be used; one line."""

    def __init__(self, message: str) -> None:
        # Parts of it may come from whoever wrote the file.
        super().__init__(" ".join(message[:1000].split()))


@dataclass(frozen=True, kw_only=True)
class Blob:
    """A file named by its content."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef") or self.bytes < 0:
            raise schema.SchemaError(f"blob {self.sha256[:80]!r} of {self.bytes} bytes is no blob")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or parameter of a program."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # numpy's name, one of DTYPES

    def __post_init__(self) -> None:
        small = all(0 <= size <= MAX_ELEMENTS for size in self.shape) and len(self.shape) <= 8
        if self.dtype not in DTYPES or not small or math.prod(self.shape) > MAX_ELEMENTS:
            raise schema.SchemaError(
                f"tensor {self.name[:80]!r} of {self.dtype[:20]} {list(self.shape)[:8]} is no tensor"
            )


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Room for one expert: how its frozen weights are stored, and the rank of the LoRA trained on them (0: frozen).

    In a base of adapter experts (FFT-MoE) there are no frozen weights: format "none", and the rank is the expert's
    width.
    """

    format: str
    rank: int

    def __post_init__(self) -> None:
        if self.format not in (*packing.FORMATS, "none") or not 0 <= self.rank <= 4096:
            raise schema.SchemaError(f"slot {self.format[:20]!r} of rank {self.rank} is no slot")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that a program is compiled for. Devices with the same shape share the program.

    Letters: B batch rows, S tokens per row, K answer positions per row, P slots of a layer.

    The slots of a layer are ordered: higher rank first, then the wider format. Experts fill them in the order of their
    value to the device. At least one slot of a layer is trained.
    """

    batch: int
    sequence: int
    answers: int
    dense: str  # format of the dense matrices
    slots: tuple[tuple[Slot, ...], ...]  # parallel to BaseIndex.moe_layers

    def __post_init__(self) -> None:
        counts = (self.batch, self.sequence, self.answers)
        if self.dense not in packing.FORMATS or not all(0 < n <= MAX_COUNT for n in counts):
            raise schema.SchemaError(f"shape with dense {self.dense[:20]!r} is no shape")
        if not all(any(slot.rank for slot in layer) for layer in self.slots):
            raise schema.SchemaError("shape with a layer in which nothing is trained")


@dataclass(frozen=True, kw_only=True)
class Program:
    """One ExecuTorch file and how to call it. Everything that changes or is large is an input.

    `inputs` in calling order. Batch inputs: `tokens` int64 [B, S], `valid` float32 [B, S] (1 = not padding),
    `positions` int64 [B, K] (flat index b * S + s of the token whose next token is scored), `targets` int64 [B, K],
    `weights` float32 [B, K]. `train` then takes the objective (`protocol.objective`), float32 [1] each:
    `objective.label_smoothing`, `.balance`, `.target_balance`, `.z_loss` (weights, 0: none), `.cap` and `.active`
    (counts, a large number: all), `.cap_backward` (1: the cap hides no expert from the forward pass, and the caller
    drops the gradients of slots that `kept` has at 0); and `objective.logit_bias` float32 [V], added to the logits of
    each row's first answer position (0: nothing). Then `dense.<name>` as the dense blob has them (`.packed`
    uint8, `.scale` float16, else float32), and per MoE layer l: `layers.l.router_rows` float32 [P, d], and for each
    projection `layers.l.{projection}.packed` uint8 [bytes] and `.scale` float16 [groups]: the slots' blobs, flat,
    one after the other; `train` also `layers.l.target` float32 [P], which sums to 1, of the heterogeneity-aware
    balance. `evaluate` also takes `layers.l.router_all` float32 [E, d] and `layers.l.resident` float32 [E]. Last
    come the `parameters`.

    `parameters` (the adapter of the resident experts): `layers.l.{projection}.a` float32 [sum of rank * in], the slots'
    lora_A [rank, in] flat, one after the other; `layers.l.{projection}.b` the same of lora_B [out, rank];
    `layers.l.router` float32 [P, d], changes of the router rows; `layers.l.output_scale` float32 [1], 1 if nobody has
    trained it, on the experts' output without the shared expert's: it stays on the device.

    `outputs` of `train`: `loss` (sum of weights * nll / sum of weights), then `layers.l.routed` float32 [P] (routed
    valid tokens per slot for which it was active), `layers.l.kept` [P] (1 within the cap) and `layers.l.taylor`
    [P], then `grad.<name>` of the whole objective for each of `parameters`; what sums over MoE layers there is a
    mean over layers. Of `evaluate`: `logits` float32 [B, K, V], then per layer `layers.l.mass` [E] (sum over valid
    tokens of the full router's probability g), `layers.l.top` [E] (the same where the expert is in the full top-k),
    `layers.l.g_log_g` [E], `layers.l.missed` [1] (sum of 1 - mass on resident experts), `layers.l.output_norm` [P]
    (sum of routed weight * norm of the expert's output, both before the output scale), `layers.l.peak` and
    `layers.l.high` [E] (largest and ceil(T / 100)-th largest g of the valid tokens among T, padding and all).
    `taylor` and these two: `protocol.update.STATS`.
    """

    blob: Blob
    method: str
    inputs: tuple[TensorSpec, ...]
    parameters: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    arena_bytes: int


@dataclass(frozen=True, kw_only=True)
class Profiling:
    """Programs that run the whole model layer by layer, one expert in memory at a time, whatever a device holds.

    Letters: B batch rows, S tokens per row, T = B * S, C tokens of an expert at a time, E experts, k experts per
    token, d hidden, R rank.

    Attributes
    ----------
    embed : `tokens` int64 [B, S], `dense.<name>` -> `hidden` [B, S, d]
    layers : one program for each kind of decoder layer. Inputs `hidden`, `dense.<name>` with the name less `place`, and
        in a layer with experts `router` [E, d] (the adapter's change included) and `router.<extra>`. Output `hidden`:
        what the layer gives without its routed experts; and with experts `x` [T, d], their input, `weight` [T, k],
        `expert` int64 [T, k], `g` [T, E], the router's probabilities
    kinds : of each decoder layer up to the last with experts, its index in `layers`
    place : what the names of a layer's dense tensors begin with; `{layer}` stands for its number
    expert : `x` [C, d], and of each projection `.packed`, `.scale`, `.a` [R * in] and `.b` [out * R] -> `y` [C, d],
        `norms` [C], the norms of y's rows
    format : of the experts' blobs
    rank : R; smaller factors are filled up with zeros
    scale : the experts' weighted sum times this is added to `hidden`
    """

    embed: Program
    layers: tuple[Program, ...]
    kinds: tuple[int, ...]
    place: str
    expert: Program
    format: str
    rank: int
    scale: float

    def __post_init__(self) -> None:
        if not all(0 <= kind < len(self.layers) for kind in self.kinds) or not self.kinds:
            raise schema.SchemaError("profiling: a layer without a program")
        if self.format not in packing.FORMATS or not 0 < self.rank <= 4096:
            raise schema.SchemaError(
                f"profiling: experts in {self.format[:20]!r} with rank {self.rank}"
            )

    def programs(self) -> tuple[Program, ...]:
        """All of them."""
        return (self.embed, *self.layers, self.expert)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Predicted peak bytes over the process's size just before the program is opened, term by term."""

    budget: int
    arena: int
    inputs: int
    parameters: int  # LoRA and router rows; their gradients are in the arena
    optimizer: int
    outputs: int
    runtime: int

    @property
    def predicted(self) -> int:
        """Sum of the terms."""
        return (
            self.arena
            + self.inputs
            + self.parameters
            + self.optimizer
            + self.outputs
            + self.runtime
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a device of one profile downloads."""

    protocol: int
    base: str
    profile: str
    shape: Shape
    train: Program
    evaluate: Program
    dense: Blob
    tokenizer: Blob
    memory: MemoryPlan
    experts: dict[str, tuple[int, ...]]  # layer -> global ids chosen at build time
    version: int = 1  # grows with every build: a device that has used one refuses an older one
    profiling: Profiling | None = None  # None: the device can only measure the experts it holds


@dataclass(frozen=True, kw_only=True)
class PeftLayout:
    """Where stock PEFT looks for our tensors. Written by `export`, used by `server`.

    Keys are templates for `key`: `{layer}`, `{expert}` and `{place}`, which is the layer's entry in `places`. A model
    of two stacks (encoder, decoder) needs places, because its layers are numbered through. `router_extra` names what a
    router has beside its rows: PEFT saves routers whole.
    """

    target_parameters: tuple[str, ...]
    target_modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    lora: dict[
        str, dict[str, str]
    ]  # projection -> lora_A | lora_B -> key; with `{expert}`: one key per expert
    router: str
    base_model_class: str
    parent_library: str
    places: dict[str, str] = field(default_factory=dict)
    router_extra: dict[str, str] = field(default_factory=dict)  # `layers.l.router.<name>` -> key

    def key(self, template: str, layer: int, expert: int = 0) -> str:
        """A template of this layout, filled in."""
        place = self.places.get(str(layer), "")
        return template.format(layer=layer, expert=expert, place=place)


@dataclass(frozen=True, kw_only=True)
class BaseIndex:
    """A sliced base: what it is and where each expert lies."""

    protocol: int
    base: str  # content hash of everything below
    model_type: str
    config: dict[str, Any]
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    vocabulary: int
    group: int
    architecture: (
        str  # "causal", or "seq2seq": targets are the decoder's output and `positions` is not used
    )
    projections: tuple[str, ...]  # of an expert: gate_up | up, down; or adapter
    dense: dict[str, Blob]  # by format
    tokenizer: Blob
    experts: dict[str, tuple[tuple[Blob, ...], ...]]  # format -> [layer position][expert]
    error: dict[str, float]  # format -> relative rms error of expert weights stored in it
    routing_prior: tuple[
        tuple[float, ...], ...
    ]  # [layer position][expert], rows sum to 1; of the base's own text
    peft: PeftLayout | None  # None: adapter experts (FFT-MoE), which PEFT does not know

    def blobs(self) -> list[Blob]:
        """Every blob of the base."""
        experts = [blob for rows in self.experts.values() for row in rows for blob in row]
        return [self.tokenizer, *self.dense.values(), *experts]

    def features(self, projection: str) -> tuple[int, int]:
        """(output, input) features of a projection: of the two factors' outer sides for an adapter expert."""
        return {
            "gate_up": (2 * self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "adapter": (self.hidden, self.hidden),
        }[projection]


def sha256_file(path: Path) -> str:
    """Content hash of a file, read in pieces."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Parsed JSON of a file of ours; raises ManifestError."""
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise ManifestError(f"{path}: {path.stat().st_size} bytes, at most {MAX_MANIFEST}")
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such file") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path}: not JSON: {error}") from error


def _check_version(data: Any, where: str) -> None:
    """Before anything else: another protocol has other keys."""
    found = data.get("protocol", PROTOCOL_VERSION) if isinstance(data, dict) else PROTOCOL_VERSION
    if isinstance(found, int) and found != PROTOCOL_VERSION:
        raise ManifestError(f"{where}: protocol {found} found, {PROTOCOL_VERSION} wanted")


def parse_manifest(data: Any, where: str) -> Manifest:
    """Check and build a `Manifest` from parsed JSON; raises ManifestError."""
    _check_version(data, where)
    try:
        return schema.from_dict(Manifest, data, where)
    except schema.SchemaError as error:
        raise ManifestError(str(error)) from error


def parse_base(data: Any, where: str) -> BaseIndex:
    """Check and build a `BaseIndex` from parsed JSON; raises ManifestError."""
    _check_version(data, where)
    try:
        base = schema.from_dict(BaseIndex, data, where)
    except schema.SchemaError as error:
        raise ManifestError(str(error)) from error
    _check_counts(base, where)
    for blobs in base.experts.values():
        if [len(row) for row in blobs] != [base.num_experts] * len(base.moe_layers):
            raise ManifestError(f"{where}: experts do not cover every layer")
    for key in (*base.experts, *base.dense, *base.error):
        if key not in packing.FORMATS:
            raise ManifestError(
                f"{where}: format {key[:20]!r}, one of {', '.join(packing.FORMATS)} wanted"
            )
    for projection in base.projections:
        if projection not in names.PROJECTIONS:
            raise ManifestError(f"{where}: projection {projection[:20]!r} is not known")
    return base


def _check_counts(base: BaseIndex, where: str) -> None:
    counts = ("num_experts", "top_k", "hidden", "intermediate", "vocabulary", "group")
    for name in counts:
        if not 0 < getattr(base, name) <= MAX_COUNT:
            raise ManifestError(f"{where}: {name} {getattr(base, name)} is out of range")
    if base.top_k > base.num_experts:
        raise ManifestError(
            f"{where}: {base.top_k} of {base.num_experts} experts cannot be used at once"
        )
    layers = base.moe_layers
    if (
        sorted(set(layers)) != list(layers)
        or not layers
        or not 0 <= layers[0] <= layers[-1] < 10_000
    ):
        raise ManifestError(f"{where}: MoE layers are not in order")
    if [len(row) for row in base.routing_prior] != [base.num_experts] * len(layers):
        raise ManifestError(f"{where}: routing_prior does not cover every expert")


def check_fits(manifest: Manifest, base: BaseIndex, where: str) -> None:
    """Raise ManifestError unless the manifest's shape can be filled from the base."""
    if manifest.base != base.base:
        raise ManifestError(f"{where}: built from another base")
    slots = manifest.shape.slots
    if len(slots) != len(base.moe_layers):
        raise ManifestError(
            f"{where}: slots for {len(slots)} layers, {len(base.moe_layers)} wanted"
        )
    if any(len(layer) > base.num_experts for layer in slots):
        raise ManifestError(f"{where}: more slots than the {base.num_experts} experts of a layer")
    if base.dense.get(manifest.shape.dense) != manifest.dense:
        raise ManifestError(f"{where}: its dense blob is not the base's")
    if manifest.tokenizer != base.tokenizer:
        raise ManifestError(f"{where}: its tokenizer is not the base's")
    for kind in {slot.format for layer in slots for slot in layer} - {"none"}:
        if kind not in base.experts:
            raise ManifestError(f"{where}: slot of {kind}, which the base lacks")
        # What will be reserved for an expert is what has been downloaded for it.
        weights = sum(math.prod(base.features(projection)) for projection in base.projections)
        wanted = packing.packed_bytes(kind, 1, weights) + weights // base.group * 2
        for blob in (blob for row in base.experts[kind] for blob in row):
            if blob.bytes < wanted:
                raise ManifestError(f"{where}: expert of {blob.bytes} bytes, {wanted} wanted")
    profiling = manifest.profiling
    if profiling is None:
        return
    if profiling.format not in base.experts:
        raise ManifestError(f"{where}: profiling in {profiling.format}, which the base lacks")
    if len(profiling.kinds) != base.moe_layers[-1] + 1:
        raise ManifestError(
            f"{where}: profiling of {len(profiling.kinds)} layers, {base.moe_layers[-1] + 1} wanted"
        )


def read_manifest(path: Path) -> Manifest:
    """Read `manifest.json`; raises ManifestError with one line."""
    return parse_manifest(read_json(path), str(path))


def read_base(path: Path) -> BaseIndex:
    """Read `base.json`; raises ManifestError with one line."""
    return parse_base(read_json(path), str(path))


def to_json(value: Manifest | BaseIndex) -> bytes:
    """Canonical bytes: the same value gives the same file."""
    return json.dumps(schema.to_dict(value), sort_keys=True, indent=1).encode() + b"\n"

"""The ExecuTorch runtime behind `Session`, without torch: one program per shape, everything else is its input.

Experts, dense weights and the adapter are our arrays; AdamW and a new adapter are written into them. Gradients lie
in the program's arena until the next step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge import native, slots
from edge.session import (
    PLAIN,
    Artifact,
    Batch,
    EvaluateSession,
    FloatArrays,
    LayerStats,
    Resident,
    SessionError,
    Terms,
    TrainSession,
)
from protocol import names, tensors
from protocol.manifest import Blob, Program

GRADIENT = "grad."
EVERY = 1 << 20  # experts: more than a layer has


class _Open:
    """A loaded program, its adapter, and the inputs that stay the same from step to step."""

    def __init__(self, artifact: Artifact, program: Program, resident: Resident) -> None:
        self.spec, self.resident, self.artifact = program, resident, artifact
        self.constant = _constant_inputs(artifact, program, resident)
        self.flat = slots.fresh(program.parameters)
        self.adapter = self.views(self.flat)
        path = artifact.path(program.blob)
        try:
            self.program = native.Program(path)
        except native.NativeError as error:
            raise SessionError(str(error)) from error

    def views(self, arrays: Mapping[str, NDArray[Any]]) -> FloatArrays:
        """The adapter's global names over flat arrays."""
        base, shape = self.artifact.base, self.artifact.manifest.shape
        return slots.views(arrays, base, shape, self.resident)

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy an adapter into the program's inputs."""
        scales = {names.output_scale(layer) for layer in self.resident}
        for name, view in self.adapter.items():
            view[...] = adapter.get(name, 1.0) if name in scales else adapter[name]

    def run(self, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Call the program; the outputs are its own memory."""
        values = []
        for spec in self.spec.inputs:
            value = given.get(spec.name)
            if value is None:
                value = self.constant.get(spec.name, self.flat.get(spec.name))
            if value is None or value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
                found = "nothing" if value is None else f"{value.dtype} {value.shape}"
                raise SessionError(
                    f"program input {spec.name}: {found}, {spec.dtype} {spec.shape} wanted"
                )
            values.append(np.ascontiguousarray(value))
        try:
            outputs = self.program.run(self.spec.method, values)
        except native.NativeError as error:
            raise SessionError(f"program {self.spec.blob.sha256[:12]}: {error}") from error
        if len(outputs) != len(self.spec.outputs):
            raise SessionError(
                f"program {self.spec.blob.sha256[:12]}: {len(outputs)} outputs, "
                f"{len(self.spec.outputs)} in the manifest"
            )
        return dict(zip(self.spec.outputs, outputs, strict=True))

    def close(self) -> None:
        """Drop the program, then its inputs."""
        self.program.close()
        self.constant, self.flat, self.adapter = {}, {}, {}


def _constant_inputs(
    artifact: Artifact, program: Program, resident: Resident
) -> dict[str, NDArray[Any]]:
    base, shape = artifact.base, artifact.manifest.shape
    adapter = {spec.name for spec in program.parameters}
    try:
        # Mapped, not read: clean pages that the system may drop and read again.
        dense = tensors.mapped(artifact.path(artifact.manifest.dense))
        arrays: dict[str, NDArray[Any]] = {f"dense.{name}": value for name, value in dense.items()}
        arrays |= slots.router_inputs(dense, resident)
        arrays |= slots.resident_inputs(base.num_experts, resident)
        arrays |= slots.expert_inputs(base, shape, resident, lambda blob: _read(artifact, blob))
        fixed = [s for s in program.inputs if s.name in arrays and s.name not in adapter]
        return slots.check_inputs(arrays, fixed, f"program {program.blob.sha256[:12]}")
    except (slots.SlotError, tensors.TensorError) as error:
        raise SessionError(str(error)) from error


def _read(artifact: Artifact, blob: Blob) -> dict[str, NDArray[Any]]:
    return tensors.mapped(artifact.path(blob))


def objective_inputs(
    terms: Terms, resident: Resident, vocabulary: int
) -> dict[str, NDArray[np.float32]]:
    """What a training program takes beside its batch and its weights, by name."""
    values = {
        "label_smoothing": terms.label_smoothing,
        "balance": terms.balance,
        "target_balance": terms.target_balance,
        "z_loss": terms.z_loss,
        "cap": terms.cap or EVERY,
        "cap_backward": terms.cap_where == "backward",
        "active": terms.active or EVERY,
    }
    given = {f"objective.{name}": np.array([value], np.float32) for name, value in values.items()}
    bias = terms.logit_bias
    given["objective.logit_bias"] = np.zeros(vocabulary, np.float32) if bias is None else bias
    for layer, ids in resident.items():
        uniform = np.full(len(ids), 1 / len(ids), np.float32)
        given[f"layers.{layer}.target"] = terms.targets.get(layer, uniform)
    return given


class ExecuTorchTraining:
    """`train.pte`: loss, routed tokens, Taylor changes and gradients."""

    def __init__(self, artifact: Artifact, resident: Resident) -> None:
        self._open = _Open(artifact, artifact.manifest.train, resident)
        self._gradients: FloatArrays = {}
        self._taylor: dict[int, NDArray[np.float32]] = {}

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """See `TrainSession`."""
        self._open.load(adapter)

    def parameters(self) -> FloatArrays:
        """See `TrainSession`."""
        return dict(self._open.adapter)

    def forward_backward(
        self, batch: Batch, terms: Terms = PLAIN
    ) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """See `TrainSession`."""
        resident = self._open.resident
        vocabulary = self._open.artifact.base.vocabulary
        seen = self._open.run(batch.inputs() | objective_inputs(terms, resident, vocabulary))
        flat = {
            name.removeprefix(GRADIENT): value
            for name, value in seen.items()
            if name.startswith(GRADIENT)
        }
        self._gradients = self._open.views(flat)
        if terms.cap and terms.cap_where == "backward":
            for layer, ids in resident.items():
                outside = [
                    e for e, k in zip(ids, seen[f"layers.{layer}.kept"], strict=True) if not k
                ]
                for name in slots.names_of({layer: tuple(outside)}, self._gradients):
                    self._gradients[name][...] = 0
        self._taylor = {layer: seen[f"layers.{layer}.taylor"].copy() for layer in resident}
        routed = {layer: seen[f"layers.{layer}.routed"].copy() for layer in resident}
        return float(seen["loss"].reshape(())), routed

    def gradients(self) -> FloatArrays:
        """See `TrainSession`."""
        return self._gradients

    def taylor(self) -> dict[int, NDArray[np.float32]]:
        """See `TrainSession`."""
        return self._taylor

    def close(self) -> None:
        """See `TrainSession`."""
        self._gradients = {}
        self._open.close()


class ExecuTorchEvaluation:
    """`evaluate.pte`: logits and routing statistics."""

    def __init__(self, artifact: Artifact, resident: Resident) -> None:
        self._open = _Open(artifact, artifact.manifest.evaluate, resident)

    def evaluate(
        self, batch: Batch, adapter: Mapping[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[int, LayerStats]]:
        """See `EvaluateSession`."""
        self._open.load(adapter)
        given: dict[str, NDArray[Any]] = dict(batch.inputs())
        for layer, ids in self._open.resident.items():
            # The full router follows the adapter, so that it is no constant.
            name = f"layers.{layer}.router_all"
            delta = self._open.flat[f"layers.{layer}.router"]
            given[name] = slots.with_deltas(self._open.constant[name], delta, ids)
        # Copies: the next batch is written over them.
        seen = {name: value.copy() for name, value in self._open.run(given).items()}
        stats = {
            layer: LayerStats(
                mass=seen[f"layers.{layer}.mass"],
                top=seen[f"layers.{layer}.top"],
                g_log_g=seen[f"layers.{layer}.g_log_g"],
                missed=float(seen[f"layers.{layer}.missed"].sum()),
                output_norm=seen[f"layers.{layer}.output_norm"],
                peak=seen[f"layers.{layer}.peak"],
                high=seen[f"layers.{layer}.high"],
            )
            for layer in self._open.resident
        }
        return seen["logits"], stats

    def close(self) -> None:
        """See `EvaluateSession`."""
        self._open.close()


class ExecuTorchBackend:
    """The runtime that a phone has."""

    name = "executorch"

    def open_train(self, artifact: Artifact, resident: Resident) -> TrainSession:
        """See `Backend`."""
        return ExecuTorchTraining(artifact, resident)

    def open_evaluate(self, artifact: Artifact, resident: Resident) -> EvaluateSession:
        """See `Backend`."""
        return ExecuTorchEvaluation(artifact, resident)


def backend() -> ExecuTorchBackend:
    """The ExecuTorch backend; raises SessionError when its library cannot be built."""
    try:
        native.library()
    except native.NativeError as error:
        raise SessionError(f"backend executorch: {error}") from error
    return ExecuTorchBackend()

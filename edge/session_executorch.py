"""The ExecuTorch runtime behind `Session`: one program per shape, experts and dense weights as its inputs.

The runtime's outputs are used without copies: gradients lie in its arena until the next step, and parameters are the
program's own memory, which is how AdamW and an adapter are written into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import executorch.kernels.quantized  # noqa: F401  registers embedding_4bit
import numpy as np
import torch
from executorch.extension.pybindings.portable_lib import (
    _load_for_executorch,
    _load_for_executorch_from_buffer,
)
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edge import slots
from edge.session import (
    Artifact,
    Batch,
    EvaluateSession,
    FloatArrays,
    LayerStats,
    Resident,
    SessionError,
    TrainSession,
)
from protocol.manifest import Blob, Program


class _Program:
    """A loaded program and the inputs that stay the same from step to step."""

    def __init__(
        self, artifact: Artifact, program: Program, resident: Resident, *, writable: bool
    ) -> None:
        self.spec, self.resident = program, resident
        self.constant = _constant_inputs(artifact, program, resident)
        path = artifact.path(program.blob)
        try:
            # Parameters are part of the program: in a mapped file they are read-only, and writing to them is a
            # segmentation fault. The runtime does not copy the buffer: it has to live as long as the module.
            self._buffer = path.read_bytes() if writable else b""
            self.module = (
                _load_for_executorch_from_buffer(self._buffer)
                if writable
                else _load_for_executorch(str(path))
            )
        except (RuntimeError, OSError) as error:
            raise SessionError(f"{path}: the runtime refuses the program: {error}") from error
        # torch tensors over the same memory, made once.
        self._fixed = {name: torch.from_numpy(value) for name, value in self.constant.items()}

    def run(self, given: Mapping[str, NDArray[Any]]) -> list[torch.Tensor]:
        """Call the program; the outputs are aliases of its memory."""
        values = []
        for spec in self.spec.inputs:
            fixed = self._fixed.get(spec.name)
            if fixed is not None:
                values.append(fixed)
                continue
            value = given.get(spec.name)
            if value is None or value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
                found = "nothing" if value is None else f"{value.dtype} {value.shape}"
                raise SessionError(
                    f"program input {spec.name}: {found}, {spec.dtype} {spec.shape} wanted"
                )
            values.append(torch.from_numpy(np.ascontiguousarray(value)))
        try:
            return list(self.module.run_method(self.spec.method, values, clone_outputs=False))
        except RuntimeError as error:
            raise SessionError(f"program {self.spec.blob.sha256[:12]}: {error}") from error

    def close(self) -> None:
        """Drop the program, then its inputs."""
        del self.module
        del self._buffer
        self._fixed = {}
        self.constant = {}


def _constant_inputs(
    artifact: Artifact, program: Program, resident: Resident
) -> dict[str, NDArray[Any]]:
    base = artifact.base
    wanted = {spec.name for spec in program.inputs}
    try:
        arrays: dict[str, NDArray[Any]] = {}
        with safe_open(str(artifact.path(base.dense)), framework="numpy") as file:
            held = set(file.keys())
            dense = {
                f"layers.{layer}.router": file.get_tensor(f"layers.{layer}.router")
                for layer in resident
                if f"layers.{layer}.router" in held
            }
            for name in wanted:
                if name.startswith("dense."):
                    # One at a time, so that the float16 originals are never all there.
                    arrays[name] = file.get_tensor(name[6:]).astype(np.float32)
        arrays |= slots.router_inputs(dense, resident)
        arrays |= slots.resident_inputs(base.num_experts, resident)
        arrays |= slots.expert_inputs(base, resident, lambda blob: _read(artifact, blob))
        fixed = [s for s in program.inputs if s.name in arrays and s.name in wanted]
        return slots.check_inputs(arrays, fixed, f"program {program.blob.sha256[:12]}")
    except slots.SlotError as error:
        raise SessionError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise SessionError(f"{artifact.path(base.dense)}: {error}") from error


def _read(artifact: Artifact, blob: Blob) -> dict[str, NDArray[Any]]:
    with safe_open(str(artifact.path(blob)), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


class ExecuTorchTraining:
    """`train.pte`: loss, routed tokens, gradients and parameters are its outputs."""

    def __init__(self, artifact: Artifact, resident: Resident) -> None:
        manifest = artifact.manifest
        self._program = _Program(artifact, manifest.train, resident, writable=True)
        method = manifest.train.method
        module = self._program.module
        try:
            first = module.run_method(f"__et_training_gradients_index_{method}", ())[0]
            second = module.run_method(f"__et_training_parameters_index_{method}", ())[0]
            names = list(module.run_method(f"__et_training_fqn_{method}", ()))
        except RuntimeError as error:
            raise SessionError(
                f"program {manifest.train.blob.sha256[:12]}: no training methods: {error}"
            ) from error
        self._gradients_at, self._parameters_at, self._names = int(first), int(second), names
        wanted = {spec.name: spec.shape for spec in manifest.train.parameters}
        if set(names) != set(wanted):
            strange = min(set(names) ^ set(wanted))
            raise SessionError(f"train program: parameter {strange} is not in both it and manifest")
        self._gradients: FloatArrays = {}
        # Parameters are outputs: the aliases exist once a step has run.
        outputs = self._program.run(_dummy_batch(artifact).inputs())
        self._parameters = dict(
            zip(names, (t.numpy() for t in outputs[self._parameters_at :]), strict=True)
        )
        for name, value in self._parameters.items():
            if value.shape != wanted[name]:
                raise SessionError(
                    f"train program: {name} is {value.shape}, {wanted[name]} in the manifest"
                )

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """See `TrainSession`."""
        for name, alias in self._parameters.items():
            alias[...] = adapter[name]

    def parameters(self) -> FloatArrays:
        """See `TrainSession`."""
        return dict(self._parameters)

    def forward_backward(self, batch: Batch) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """See `TrainSession`."""
        outputs = self._program.run(batch.inputs())
        gradients = outputs[self._gradients_at : self._parameters_at]
        self._gradients = dict(zip(self._names, (t.numpy() for t in gradients), strict=True))
        seen = dict(zip(self._program.spec.outputs, outputs[: self._gradients_at], strict=True))
        routed = {
            layer: seen[f"layers.{layer}.routed"].numpy().copy() for layer in self._program.resident
        }
        return float(seen["loss"]), routed

    def gradients(self) -> FloatArrays:
        """See `TrainSession`."""
        return self._gradients

    def close(self) -> None:
        """See `TrainSession`."""
        self._gradients, self._parameters = {}, {}
        self._program.close()


class ExecuTorchEvaluation:
    """`evaluate.pte`: logits and routing statistics; the adapter is an input."""

    def __init__(self, artifact: Artifact, resident: Resident) -> None:
        self._program = _Program(artifact, artifact.manifest.evaluate, resident, writable=False)
        # The full router follows the adapter, so that it is no constant.
        self._routers = {
            layer: self._program.constant[f"layers.{layer}.router_all"] for layer in resident
        }
        for layer in resident:
            del self._program._fixed[f"layers.{layer}.router_all"]

    def evaluate(
        self, batch: Batch, adapter: Mapping[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[int, LayerStats]]:
        """See `EvaluateSession`."""
        given: dict[str, NDArray[Any]] = {**batch.inputs(), **adapter}
        for layer, ids in self._program.resident.items():
            given[f"layers.{layer}.router_all"] = slots.with_deltas(
                self._routers[layer], adapter[f"layers.{layer}.router"], ids
            )
        outputs = self._program.run(given)
        # Copies: the next batch is written over them.
        seen = {
            name: t.numpy().copy()
            for name, t in zip(self._program.spec.outputs, outputs, strict=True)
        }
        stats = {
            layer: LayerStats(
                mass=seen[f"layers.{layer}.mass"],
                top=seen[f"layers.{layer}.top"],
                g_log_g=seen[f"layers.{layer}.g_log_g"],
                missed=float(seen[f"layers.{layer}.missed"].sum()),
                output_norm=seen[f"layers.{layer}.output_norm"],
            )
            for layer in self._program.resident
        }
        return seen["logits"], stats

    def close(self) -> None:
        """See `EvaluateSession`."""
        self._routers = {}
        self._program.close()


def _dummy_batch(artifact: Artifact) -> Batch:
    shape = artifact.manifest.shape
    tokens, places = (shape.batch, shape.sequence), (shape.batch, shape.answers)
    return Batch(
        np.zeros(tokens, np.int64),
        np.ones(tokens, np.float32),
        np.zeros(places, np.int64),
        np.zeros(places, np.int64),
        np.ones(places, np.float32),
        np.full(shape.batch, -1, np.int64),
    )


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
    """The ExecuTorch backend."""
    return ExecuTorchBackend()

"""Generating in the ExecuTorch runtime, without torch: experts, dense weights and adapter are inputs."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from edge import native, slots
from edge.decode import Arrays, CachedDecoder, GenerateError, Opened, adapter_inputs
from edge.slots import SlotError
from protocol import tensors


def _inputs(opened: Opened) -> dict[str, NDArray[Any]]:
    """Everything that stays the same from call to call, by input name."""
    artifact, plan = opened.artifact, opened.plan
    base = artifact.base
    try:
        dense = tensors.mapped(artifact.path(base.dense[plan.shape.dense]))
        arrays: dict[str, NDArray[Any]] = {f"dense.{name}": value for name, value in dense.items()}
        arrays |= slots.router_inputs(dense, opened.resident)
        arrays |= slots.expert_inputs(
            base, plan.shape, opened.resident, lambda blob: tensors.mapped(artifact.path(blob))
        )
        arrays |= adapter_inputs(opened)
        wanted = [spec for spec in plan.decoders["executorch"].inputs if spec.name in arrays]
        return slots.check_inputs(arrays, wanted, "decoding program")
    except (KeyError, SlotError, tensors.TensorError) as error:
        raise GenerateError(str(error)) from error


def open_decoder(opened: Opened, threads: int) -> CachedDecoder:
    """Open `prefill` and `decode`; raises GenerateError."""
    decoder = opened.plan.decoders.get("executorch")
    if decoder is None:
        raise GenerateError("the artifact has no ExecuTorch decoder")
    constant = _inputs(opened)
    try:
        program = native.Program(opened.artifact.path(decoder.blob))
        native.set_threads(threads)
    except native.NativeError as error:
        raise GenerateError(str(error)) from error

    def call(method: str, given: dict[str, NDArray[Any]]) -> Arrays:
        values = [given[s.name] if s.name in given else constant[s.name] for s in decoder.inputs]
        try:
            return dict(zip(decoder.outputs, program.run(method, values), strict=True))
        except native.NativeError as error:
            raise GenerateError(f"{method}: {error}") from error

    return CachedDecoder(call, decoder.inputs, opened.plan, whole=False)

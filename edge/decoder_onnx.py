"""Generating in ONNX Runtime: the model names the blobs, the adapter is an input."""

from __future__ import annotations

from typing import Any

import onnxruntime
from numpy.typing import NDArray

from edge.decode import Arrays, CachedDecoder, GenerateError, Opened, adapter_inputs


def open_decoder(opened: Opened, threads: int) -> CachedDecoder:
    """Open the model; raises GenerateError."""
    decoder = opened.plan.decoders.get("onnx")
    if decoder is None:
        raise GenerateError("the artifact has no ONNX decoder")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    path = opened.artifact.path(decoder.blob)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions have no common class of their own
        raise GenerateError(f"{path}: {str(error).splitlines()[0]}") from error
    adapter = adapter_inputs(opened)

    def call(method: str, given: dict[str, NDArray[Any]]) -> Arrays:
        values = {
            s.name: given[s.name] if s.name in given else adapter[s.name] for s in decoder.inputs
        }
        found = session.run(list(decoder.outputs), values)
        return dict(zip(decoder.outputs, found, strict=True))

    return CachedDecoder(call, decoder.inputs, opened.plan, whole=True)

"""What a training backend must do. Arrays in, arrays out; expert ids are turned into slots before it is called.

Letters: L MoE layers, E experts, P slots of a layer, B batch rows, S tokens per row, K answer positions per row,
V vocabulary, R rank, d hidden, f expert width.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.manifest import BaseIndex, Blob, Manifest

FloatArrays = dict[str, NDArray[np.float32]]
Resident = dict[int, tuple[int, ...]]
"""MoE layer -> global expert ids, in slot order."""


class SessionError(RuntimeError):
    """A program, or a set of experts, that cannot be run here."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one step, named as in `protocol.manifest.Program`. `labels` stays on the device's own side.

    Attributes
    ----------
    tokens : int64 [B, S]
    valid : float32 [B, S], 1 where there is a token
    positions : int64 [B, K], b * S + s of the token before answer token k
    targets : int64 [B, K]
    weights : float32 [B, K], 0 where there is no answer token
    labels : int64 [B], index of the row's label, -1 without
    """

    tokens: NDArray[np.int64]
    valid: NDArray[np.float32]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    labels: NDArray[np.int64]

    def inputs(self) -> dict[str, NDArray[Any]]:
        """The arrays that a program takes, by name."""
        return {
            "tokens": self.tokens,
            "valid": self.valid,
            "positions": self.positions,
            "targets": self.targets,
            "weights": self.weights,
        }


@dataclass(frozen=True)
class LayerStats:
    """Routing over the valid tokens of a batch, one layer: sums, and extremes. See `protocol.update.STATS`."""

    mass: NDArray[np.float32]  # [E]
    top: NDArray[np.float32]  # [E]
    g_log_g: NDArray[np.float32]  # [E]
    missed: float
    output_norm: NDArray[np.float32]  # [P]
    peak: NDArray[np.float32]  # [E], largest g among the batch's valid tokens
    high: NDArray[np.float32]  # [E], the ceil(T/100)-th largest; 0 with fewer valid tokens


@dataclass(frozen=True)
class Terms:
    """The part of `protocol.objective.Objective` that is inside a program's graph; the meanings are there.

    What sums over MoE layers is a mean over layers. Balances and z-loss are over the residents' router, also those
    beyond the cap; a router of sigmoids is balanced by its scores as shares of their sum.

    Attributes
    ----------
    logit_bias : float32 [V], added to the logits of a row's first answer token in training; None: nothing
    targets : MoE layer -> float32 [P], sums to 1; of the heterogeneity-aware balance. Uniform where it is missing
    """

    label_smoothing: float = 0.0
    balance: float = 0.0
    target_balance: float = 0.0
    z_loss: float = 0.0
    cap: int = 0
    cap_where: Literal["both", "backward"] = "both"
    active: int = 0
    targets: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    logit_bias: NDArray[np.float32] | None = None


PLAIN = Terms()


@dataclass(frozen=True)
class Artifact:
    """What lies on the device: two indices and the folder of blobs they name."""

    base: BaseIndex
    manifest: Manifest
    blobs: Path

    def path(self, blob: Blob) -> Path:
        """Where a blob lies."""
        return self.blobs / blob.sha256


class TrainSession(Protocol):
    """An open training program."""

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy an adapter (global names, all of `slots.adapter_shapes`) into the parameters.

        Output scales (`names.output_scale`) stay on the device: one that is missing becomes 1.
        """

    def parameters(self) -> FloatArrays:
        """Global name -> live alias: what is written to it is what the next step uses. Output scales are among them."""

    def forward_backward(
        self, batch: Batch, terms: Terms = PLAIN
    ) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """Loss, and routed valid tokens per slot of each layer; the gradients are then ready.

        The gradients are those of the whole objective. The loss is the weighted negative log-likelihood alone, under
        the logits with `Terms.logit_bias`, as the device would answer; tokens count for the experts that were active
        for them.
        """

    def gradients(self) -> FloatArrays:
        """Gradients of the last step, same names and shapes as `parameters`; valid until the next step."""

    def taylor(self) -> dict[int, NDArray[np.float32]]:
        """MoE layer -> [P] of the last step, see `protocol.update.STATS`."""

    def close(self) -> None:
        """Give the memory back."""


class EvaluateSession(Protocol):
    """An open evaluation program."""

    def evaluate(
        self, batch: Batch, adapter: Mapping[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[int, LayerStats]]:
        """Logits [B, K, V] at the batch's positions, and statistics per layer."""

    def close(self) -> None:
        """Give the memory back."""


class Backend(Protocol):
    """A way to run programs. Only one session is open at a time, so that the peak is the larger, not the sum."""

    name: str

    def open_train(self, artifact: Artifact, resident: Resident) -> TrainSession:
        """Raises SessionError."""

    def open_evaluate(self, artifact: Artifact, resident: Resident) -> EvaluateSession:
        """Raises SessionError."""


BACKENDS = {
    "executorch": "edge.session_executorch",
    "torch": "edge.session_torch",
    "torch-routed": "edge.routed_torch",
    "torch-nf4": "edge.session_nf4",
}


def load_backend(name: str) -> Backend:
    """Import the one backend that is used: each brings hundreds of megabytes of libraries.

    Raises
    ------
    SessionError
        When its libraries are not installed.
    """
    try:
        module = importlib.import_module(BACKENDS[name])
    except ImportError as error:
        raise SessionError(f"backend {name} cannot be loaded: {error}") from error
    backend: Backend = module.backend()
    return backend

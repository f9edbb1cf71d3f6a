"""Sums over batches: routing statistics per expert, loss, accuracy. Pure.

Letters: L MoE layers, E experts, P slots, B batch rows, K answer positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.session import Batch, FloatArrays, LayerStats, Resident
from protocol import update


class RoutingSums:
    """Adds up `LayerStats`, routed tokens and Taylor changes into the [L, E] arrays of an update."""

    def __init__(self, moe_layers: Sequence[int], experts: int, resident: Resident) -> None:
        self._row = {layer: i for i, layer in enumerate(moe_layers)}
        self._resident = resident
        # float64: sums of a long evaluation are compared between devices.
        self._sums = {name: np.zeros((len(moe_layers), experts)) for name in update.STATS}
        self._missed = np.zeros(len(moe_layers))
        self._batches = 0
        self.tokens = 0

    def add(self, batch: Batch, stats: Mapping[int, LayerStats]) -> None:
        """Add an evaluated batch."""
        # A decoder sees its answers, which may be more than a prompt.
        self.tokens += int(max(batch.valid.sum(), (batch.weights > 0).sum()))
        self._batches += 1
        for layer, found in stats.items():
            row = self._row[layer]
            self._sums["mass"][row] += found.mass
            self._sums["top"][row] += found.top
            self._sums["g_log_g"][row] += found.g_log_g
            self._sums["peak"][row] += found.peak
            self._sums["high"][row] += found.high
            self._sums["output_norm"][row, list(self._resident[layer])] += found.output_norm
            self._missed[row] += found.missed

    def add_routed(
        self, routed: Mapping[int, NDArray[np.float32]], trained: Mapping[int, Sequence[int]]
    ) -> None:
        """Add the routed tokens of a training step; those of frozen experts gave no gradient and do not count."""
        for layer, counts in routed.items():
            held = list(self._resident[layer])
            gave = np.where(np.isin(held, list(trained[layer])), counts.astype(np.float64), 0)
            self._sums["trained_tokens"][self._row[layer], held] += gave

    def add_taylor(self, changes: Mapping[int, NDArray[np.float32]]) -> None:
        """Add `TrainSession.taylor` of a training step."""
        for layer, values in changes.items():
            self._sums["taylor"][self._row[layer], list(self._resident[layer])] += values

    def arrays(self) -> FloatArrays:
        """float32 [L, E] each, named as in `protocol.update.STATS`."""
        means = {name: self._sums[name] / max(self._batches, 1) for name in ("peak", "high")}
        return {name: value.astype(np.float32) for name, value in (self._sums | means).items()}

    def missed_mass(self) -> tuple[float, ...]:
        """Mean per token and layer of the full router's mass on experts that are not here, in [0, 1]."""
        # The router's probabilities of a token sum to 1: the mass of a layer counts the tokens that passed it.
        share = self._missed / np.maximum(self._sums["mass"].sum(-1), 1.0)
        return tuple(float(x) for x in np.clip(share, 0, 1))


class Score:
    """Loss per answer token, and accuracy over rows with labels."""

    def __init__(self) -> None:
        self._nll, self._weight, self._right, self._rows = 0.0, 0.0, 0, 0

    def add(
        self, logits: NDArray[np.float32], batch: Batch, first: NDArray[np.int64] | None
    ) -> None:
        """Add logits [B, K, V]; `first` [labels] are the first answer tokens, None without labels."""
        shifted = logits - logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(shifted, dtype=np.float64).sum(-1))
        picked = np.take_along_axis(shifted, batch.targets[..., None], -1)[..., 0]
        self._nll += float(((log_sum - picked) * batch.weights).sum())
        self._weight += float(batch.weights.sum())
        if first is not None:
            there = batch.labels >= 0
            guess = logits[:, 0, :][:, first].argmax(-1)
            self._right += int((guess == batch.labels)[there].sum())
            self._rows += int(there.sum())

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per answer token, nats; 0 when nothing was measured."""
        return self._nll / self._weight if self._weight else 0.0

    @property
    def accuracy(self) -> float:
        """Share of rows whose best label is the right one; -1 when nothing was measured."""
        return self._right / self._rows if self._rows else -1.0

"""Sums over batches: routing statistics per expert, loss, accuracy. Pure.

Letters: L MoE layers, E experts, P slots, B batch rows, K answer positions, V vocabulary, Y labels.
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

    def shares(self) -> dict[int, NDArray[np.float64]]:
        """MoE layer -> [P], the residents' share of the router's mass on them; uniform where nothing was measured."""
        found = {}
        for layer, held in self._resident.items():
            mass = np.maximum(self._sums["mass"][self._row[layer], list(held)], 0)
            total = mass.sum()
            found[layer] = mass / total if total > 0 else np.full(len(held), 1 / len(held))
        return found

    def missed_mass(self) -> tuple[float, ...]:
        """Mean per token and layer of the full router's mass on experts that are not here, in [0, 1]."""
        # The router's probabilities of a token sum to 1: the mass of a layer counts the tokens that passed it.
        share = self._missed / np.maximum(self._sums["mass"].sum(-1), 1.0)
        return tuple(float(x) for x in np.clip(share, 0, 1))


def label_information(counts: NDArray[np.floating]) -> NDArray[np.float64]:
    """Each expert's share of the information that routing carries about the label.

    Parameters
    ----------
    counts : [..., E, Y], how many tokens of a label (soft: by router probability) an expert got

    Returns
    -------
    [..., E] nats: p_e KL(p(y|e) || p(y)), whose sum over experts is I(E;Y) exactly, as every token has one expert. The
    plug-in estimate of a sum is too large by about (E - 1)(Y - 1) / 2N (Miller and Madow 1955; E, Y: those that occur;
    N: all tokens); as much is taken off, from each expert in proportion, and nothing falls below 0. Tokens of one row
    are not independent, so that some of the bias stays.

    Examples
    --------
    >>> label_information(np.array([[500.0, 0.0], [0.0, 500.0]])).round(4).tolist()  # log 2, less 1 / 2000
    [0.3463, 0.3463]
    >>> label_information(np.array([[30.0, 30.0], [10.0, 10.0]])).tolist()
    [0.0, 0.0]
    """
    joint = np.asarray(counts, np.float64)
    total = joint.sum((-2, -1), keepdims=True)
    joint = joint / np.where(total > 0, total, 1)
    expert, label = joint.sum(-1, keepdims=True), joint.sum(-2, keepdims=True)
    apart = expert * label
    ratio = np.divide(joint, apart, out=np.ones_like(joint), where=(joint > 0) & (apart > 0))
    each: NDArray[np.float64] = np.maximum((joint * np.log(ratio)).sum(-1), 0)
    kinds = ((expert > 0).sum((-2, -1)) - 1) * ((label > 0).sum((-2, -1)) - 1)
    bias = kinds / (2 * np.where(total > 0, total, 1)[..., 0, 0])
    whole = each.sum(-1)
    left = np.maximum(0, 1 - np.divide(bias, whole, out=np.zeros_like(whole), where=whole > 0))
    return np.asarray(each * left[..., None])


class LabelCounts:
    """Soft counts of experts and labels, from batches whose rows share a label. They never leave the device."""

    def __init__(self, moe_layers: Sequence[int], experts: int, labels: int) -> None:
        self._row = {layer: i for i, layer in enumerate(moe_layers)}
        self._counts = np.zeros((len(moe_layers), experts, labels))

    def add(self, batch: Batch, stats: Mapping[int, LayerStats]) -> None:
        """Count a batch; one without labels, or with several, is passed over."""
        # Not np.unique: its first call imports a MiB of numpy.ma.
        found = set(batch.labels[batch.valid.any(-1)].tolist())
        if len(found) == 1 and (label := found.pop()) >= 0:
            for layer, sums in stats.items():
                self._counts[self._row[layer], :, label] += sums.top

    def information(self) -> NDArray[np.float32]:
        """float32 [L, E], see `label_information`; all 0 without labels."""
        if not self._counts.size:
            return np.zeros(self._counts.shape[:2], np.float32)
        return label_information(self._counts).astype(np.float32)


def with_prior(logits: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits [N, V] with a label prior [V], see `Objective.label_prior`: what all labels have together stays.

    >>> z = np.log(np.float32([[0.2, 0.2, 0.6]]))
    >>> np.exp(with_prior(z, np.float32([np.log(3), 1e-9, 0]))).round(3).tolist()
    [[0.30000001192092896, 0.10000000149011612, 0.6000000238418579]]
    """
    labels = bias != 0
    raw = logits[:, labels].astype(np.float64)
    top = raw.max(-1, keepdims=True)
    share = np.exp(raw - top)
    shift = np.log(share.sum(-1)) - np.log(
        (share * np.exp(bias[labels].astype(np.float64))).sum(-1)
    )
    moved = logits.copy()
    moved[:, labels] += (bias[labels] + shift[:, None]).astype(np.float32)
    return moved


class Score:
    """Loss per answer token, and accuracy over rows with labels."""

    def __init__(self, bias: NDArray[np.float32] | None = None) -> None:
        """`bias` [V] is the label prior on every first answer token, see `with_prior`."""
        self._bias = bias
        self._nll, self._weight, self._right, self._rows = 0.0, 0.0, 0, 0

    def add(
        self, logits: NDArray[np.float32], batch: Batch, first: NDArray[np.int64] | None
    ) -> None:
        """Add logits [B, K, V]; `first` [labels] are the first answer tokens, None without labels.

        Row by row: copies of all logits would be the largest arrays of a small device's lease.
        """
        for row, label in enumerate(batch.labels):
            z = logits[row]
            if self._bias is not None:
                z = z.copy()
                z[:1] = with_prior(z[:1], self._bias)
            shifted = z - z.max(-1, keepdims=True)
            log_sum = np.log(np.exp(shifted, dtype=np.float64).sum(-1))
            picked = np.take_along_axis(shifted, batch.targets[row, :, None], -1)[:, 0]
            self._nll += float(((log_sum - picked) * batch.weights[row]).sum())
            self._weight += float(batch.weights[row].sum())
            if first is not None and label >= 0:
                self._right += int(z[0, first].argmax() == label)
                self._rows += 1

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per answer token, nats; 0 when nothing was measured."""
        return self._nll / self._weight if self._weight else 0.0

    @property
    def accuracy(self) -> float:
        """Share of rows whose best label is the right one; -1 when nothing was measured."""
        return self._right / self._rows if self._rows else -1.0

"""Two baselines that train something else than experts, behind the same `Backend`: adapter experts and a linear probe.

What they train travels under names of adapter experts, because these are what aggregation takes one factor at a time:
FFT-MoE's adapter expert m of layer l as (l, m), the probe's two factors as (first MoE layer, 0).
Letters: T tokens, M adapter experts, h their width, d hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from edge.routed_torch import Body, RoutedBlock, RoutedSession, open_body
from edge.session import PLAIN, Artifact, Batch, FloatArrays, LayerStats, Resident, Terms
from protocol import names
from protocol.manifest import BaseIndex

ADAPTERS, ADAPTER_WIDTH, ADAPTER_TOP_K = 4, 4, 2
PROBE_RANK = 16


class Beside(nn.Module):  # type: ignore[misc]
    """A frozen sparse block with M small experts and a router of their own beside it (FFT-MoE, arXiv 2508.18663)."""

    def __init__(self, block: RoutedBlock, hidden: int) -> None:
        super().__init__()
        self.block = block
        rng = np.random.default_rng([17, block.layer])
        start = rng.normal(0, 0.02, (ADAPTERS, hidden)).astype(np.float32)
        self.gate = torch.from_numpy(start)
        shapes = (
            (ADAPTERS, ADAPTER_WIDTH, hidden),
            (ADAPTERS, hidden, ADAPTER_WIDTH),
            (ADAPTERS, hidden),
        )
        self.trained = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        self.routed = torch.zeros(ADAPTERS)
        self.loss: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, d] -> the same shape."""
        x = hidden.reshape(-1, hidden.shape[-1])
        run = self.block.run
        assert run is not None
        down, up, moved = self.trained
        logits = x @ (self.gate + moved).t()
        p = logits.softmax(-1)
        k = run.terms.active or ADAPTER_TOP_K
        weight, chosen = p.topk(min(k, ADAPTERS), -1)
        weight = weight / weight.sum(-1, keepdim=True)
        share = torch.zeros_like(p).scatter(1, chosen, weight)
        inner = F.silu(torch.einsum("td,mhd->tmh", x, down)) * share[:, :, None]
        beside = torch.einsum("tmh,mdh->td", inner, up)
        if run.train:
            valid = run.valid[:, None]
            self.routed = ((share > 0) * valid).sum(0).detach()
            self.loss = self._loss(logits, p, run.terms, run.valid, k)
        # The frozen router has no objective of its own.
        self.block.run = replace(run, terms=PLAIN)
        return self.block(hidden) + beside.view(hidden.shape)

    def _loss(self, logits: Tensor, p: Tensor, terms: Terms, valid: Tensor, k: int) -> Tensor:
        mean = (p * valid[:, None]).sum(0) / valid.sum()
        even = np.full(ADAPTERS, 1 / ADAPTERS, np.float32)
        target = torch.from_numpy(np.asarray(terms.targets.get(self.block.layer, even)))
        kl = (target * (target.clamp_min(1e-9).log() - mean.clamp_min(1e-9).log())).sum()
        z = (torch.logsumexp(logits, -1).square() * valid).sum() / valid.sum()
        return terms.target_balance * math.sqrt(ADAPTERS / k) * kl + terms.z_loss * z


class _Frozen(RoutedSession):
    """A session over a frozen sub-MoE; subclasses say what is trained."""

    def frozen(self, batch: Batch, terms: Terms, train: bool) -> Tensor:
        """Hidden states at the answers."""
        return self.hidden(batch, terms, train=train, statistics=False)

    def parameters(self) -> FloatArrays:
        """See `TrainSession`."""
        return self._trained(lambda t: t.detach().numpy())

    def gradients(self) -> FloatArrays:
        """See `TrainSession`."""
        return self._trained(lambda t: t.grad.numpy())

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """See `TrainSession`."""
        for name, alias in self.parameters().items():
            alias[...] = adapter[name]

    def taylor(self) -> dict[int, NDArray[np.float32]]:
        """There are no experts to remove."""
        return {}

    def evaluate(
        self, batch: Batch, adapter: Mapping[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[int, LayerStats]]:
        """See `EvaluateSession`; without statistics."""
        self.load(adapter)
        logits = self.logits(batch)
        return logits.view(*batch.positions.shape, -1).numpy(), {}

    def _trained(self, array: Any) -> FloatArrays:
        raise NotImplementedError

    def _loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        weights = torch.from_numpy(batch.weights).reshape(-1)
        asked = weights.nonzero()[:, 0]
        targets = torch.from_numpy(batch.targets).reshape(-1)[asked]
        nll = F.cross_entropy(self.head(hidden[asked]), targets, reduction="none")
        return (nll * weights[asked]).sum() / weights.sum()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        return self.body.model.lm_head(hidden)

    def logits(self, batch: Batch, terms: Terms = PLAIN) -> Tensor:
        """See `RoutedSession`."""
        with torch.no_grad():
            return self.head(self.frozen(batch, terms, False))


class AdapterSession(_Frozen):
    """FFT-MoE's adapter experts and their routers."""

    def _trained(self, array: Any) -> FloatArrays:
        found: FloatArrays = {}
        for layer, beside in besides(self.body).items():
            down, up, moved = (array(t) for t in beside.trained)
            for m in range(ADAPTERS):
                found[names.lora(layer, m, "adapter", "lora_A")] = down[m]
                found[names.lora(layer, m, "adapter", "lora_B")] = up[m]
                found[names.router_row(layer, m)] = moved[m]
        return found

    def forward_backward(
        self, batch: Batch, terms: Terms = PLAIN
    ) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """See `TrainSession`."""
        parts = besides(self.body)
        for beside in parts.values():
            for tensor in beside.trained:
                tensor.grad = torch.zeros_like(tensor)
        nll = self._loss(self.frozen(batch, terms, True), batch)
        extra = [beside.loss for beside in parts.values() if beside.loss is not None]
        (nll + torch.stack(extra).mean()).backward()
        return float(nll.detach()), {layer: b.routed.numpy() for layer, b in parts.items()}


class ProbeSession(_Frozen):
    """A linear map of rank 16 added to the output layer, over frozen features."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        index = self.body.artifact.base
        self.factors = [
            torch.zeros(PROBE_RANK, index.hidden, requires_grad=True),
            torch.zeros(index.vocabulary, PROBE_RANK, requires_grad=True),
        ]
        self.first = index.moe_layers[0]
        self.row = torch.zeros(
            index.hidden, requires_grad=True
        )  # every expert has one; nothing reads it

    def _trained(self, array: Any) -> FloatArrays:
        found = {
            names.lora(self.first, 0, "adapter", factor): array(tensor)
            for factor, tensor in zip(names.FACTORS, self.factors, strict=True)
        }
        return {**found, names.router_row(self.first, 0): array(self.row)}

    def head(self, hidden: Tensor) -> Tensor:
        """Logits with the probe's part."""
        a, b = self.factors
        return self.body.model.lm_head(hidden) + (hidden @ a.t()) @ b.t()

    def forward_backward(
        self, batch: Batch, terms: Terms = PLAIN
    ) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """See `TrainSession`."""
        for tensor in (*self.factors, self.row):
            tensor.grad = torch.zeros_like(tensor)
        with torch.no_grad():
            hidden = self.frozen(batch, terms, False)
        loss = self._loss(hidden, batch)
        loss.backward()
        tokens = np.array([batch.valid.sum()], np.float32)
        none = np.zeros(1, np.float32)
        return float(loss.detach()), {
            layer: tokens if layer == self.first else none for layer in self.body.blocks
        }


def besides(body: Body) -> dict[int, Beside]:
    """Layer -> its adapter experts."""
    return {layer: body.model.model.layers[layer].mlp for layer in body.blocks}


class BaselineBackend:
    """Opens one of the two over a frozen sub-MoE that is set from outside, because a job names only what is trained."""

    name = "torch-baseline"

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._body: Body | None = None
        self.frozen: Resident = {}

    def _open(self, artifact: Artifact, resident: Resident) -> _Frozen:
        if self._body is None:
            self._body = open_body(artifact)
            if self.kind == "adapters":
                for layer, block in self._body.blocks.items():
                    hidden = artifact.base.hidden
                    self._body.model.model.layers[layer].mlp = Beside(block, hidden)
        session = AdapterSession if self.kind == "adapters" else ProbeSession
        return session(self._body, self.frozen, artifact.manifest.shape)

    def open_train(self, artifact: Artifact, resident: Resident) -> _Frozen:
        """See `Backend`."""
        return self._open(artifact, resident)

    def open_evaluate(self, artifact: Artifact, resident: Resident) -> _Frozen:
        """See `Backend`."""
        return self._open(artifact, resident)


def fresh(kind: str, base: BaseIndex) -> dict[str, NDArray[np.float32]]:
    """The adapter that nothing has trained yet: A as LoRA starts it, B and router changes zero."""
    from protocol import lora

    made: dict[str, NDArray[np.float32]] = {}
    if kind == "probe":
        key = names.lora(base.moe_layers[0], 0, "adapter", "lora_A")
        made[key] = lora.fresh_a(key, PROBE_RANK, base.hidden)
        made[key.replace("lora_A", "lora_B")] = np.zeros((base.vocabulary, PROBE_RANK), np.float32)
        made[names.router_row(base.moe_layers[0], 0)] = np.zeros(base.hidden, np.float32)
        return made
    for layer in base.moe_layers:
        for m in range(ADAPTERS):
            key = names.lora(layer, m, "adapter", "lora_A")
            made[key] = lora.fresh_a(key, ADAPTER_WIDTH, base.hidden)
            made[key.replace("lora_A", "lora_B")] = np.zeros(
                (base.hidden, ADAPTER_WIDTH), np.float32
            )
            made[names.router_row(layer, m)] = np.zeros(base.hidden, np.float32)
    return made


def trained_floats(kind: str, base: BaseIndex) -> int:
    """Numbers that a client trains."""
    return sum(int(value.size) for value in fresh(kind, base).values())

"""PyTorch behind `Session`: autograd over transformers and stock PEFT. The other backends are held to it.

Letters as in `session.py`, T = B * S tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from edge.plain_torch import PlainSession
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
from edge.submoe_torch import SubMoe, build

_Routing = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], float]


class TorchSession:
    """One sub-MoE; trains and evaluates."""

    def __init__(self, model: SubMoe, artifact: Artifact, resident: Resident) -> None:
        self._model, self._resident = model, resident
        self._top_k = artifact.base.top_k
        self._values = model.views(lambda parameter: parameter.detach().numpy())
        for parameter in model.trained():
            parameter.requires_grad_(True)

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """See `TrainSession`."""
        for name, alias in self._values.items():
            alias[...] = adapter[name]

    def parameters(self) -> FloatArrays:
        """See `TrainSession`."""
        return dict(self._values)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        # Padding is on the right, so that the causal mask alone keeps it from every valid token.
        hidden = self._model.body(torch.from_numpy(batch.tokens), use_cache=False).last_hidden_state
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat[torch.from_numpy(batch.positions).reshape(-1)]

    def forward_backward(self, batch: Batch) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """See `TrainSession`."""
        valid = torch.from_numpy(batch.valid).reshape(-1)
        routed: dict[int, NDArray[np.float32]] = {}
        hooks = []
        for layer, block in self._model.blocks.items():

            def count(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                chosen = F.one_hot(args[1], len(self._resident[layer])).sum(1) * valid[:, None]
                # Assigned, not added: a recomputed forward counts the same tokens again.
                routed[layer] = chosen.sum(0).numpy().astype(np.float32)

            hooks.append(block.experts.register_forward_hook(count))
        try:
            for parameter in self._model.trained():
                parameter.grad = None
            logits = self._model.head(self._hidden(batch))
            nll = F.cross_entropy(
                logits, torch.from_numpy(batch.targets).reshape(-1), reduction="none"
            )
            weights = torch.from_numpy(batch.weights).reshape(-1)
            loss = (nll * weights).sum() / weights.sum()
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        return float(loss.detach()), routed

    def gradients(self) -> FloatArrays:
        """See `TrainSession`."""
        for parameter in self._model.trained():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return self._model.views(lambda parameter: parameter.grad.numpy())

    def evaluate(
        self, batch: Batch, adapter: Mapping[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[int, LayerStats]]:
        """See `EvaluateSession`."""
        self.load(adapter)
        valid = torch.from_numpy(batch.valid).reshape(-1)
        partial: dict[int, _Routing] = {}
        norms: dict[int, NDArray[np.float32]] = {}
        hooks = []
        for layer, block in self._model.blocks.items():

            def route(
                module: nn.Module,
                args: Any,
                output: Any,
                layer: int = layer,
            ) -> None:
                hidden = args[0].reshape(-1, args[0].shape[-1])
                g = self._model.probabilities(layer, hidden)
                partial[layer] = _routing(g, valid, self._top_k, self._resident[layer])

            def weigh(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                hidden, chosen, weights = args[:3]
                norms[layer] = _output_norms(module, hidden, chosen, weights, valid)

            hooks.append(block.gate.register_forward_hook(route))
            hooks.append(block.experts.register_forward_hook(weigh))
        try:
            with torch.no_grad():
                logits = self._model.head(self._hidden(batch))
        finally:
            for hook in hooks:
                hook.remove()
        shape = (*batch.positions.shape, logits.shape[-1])
        stats = {
            layer: LayerStats(
                mass=partial[layer][0],
                top=partial[layer][1],
                g_log_g=partial[layer][2],
                missed=partial[layer][3],
                output_norm=norms[layer],
            )
            for layer in partial
        }
        return logits.reshape(shape).numpy(), stats

    def close(self) -> None:
        """See `TrainSession`."""
        self._values = {}
        del self._model


def _routing(
    g: torch.Tensor,
    valid: torch.Tensor,
    top_k: int,
    resident: tuple[int, ...],
) -> _Routing:
    """(mass, top, g log g, missed) of the full router's distribution [T, E]."""
    top = torch.zeros_like(g).scatter(1, g.topk(top_k, -1).indices, 1.0) * g
    log = torch.where(g > 0, g * torch.log(g), torch.zeros_like(g))
    missed = ((1 - g[:, list(resident)].sum(-1)) * valid).sum()
    sums = [(x * valid[:, None]).sum(0).numpy() for x in (g, top, log)]
    return sums[0], sums[1], sums[2], float(missed)


def _output_norms(
    experts: Any,
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    valid: torch.Tensor,
) -> NDArray[np.float32]:
    """Sum over valid tokens of routed weight * norm of the expert's output, [P]. Runs while LoRA is active."""
    sums = torch.zeros(experts.num_experts)
    for slot in range(experts.num_experts):
        token, place = torch.where(chosen == slot)
        gate, up = F.linear(hidden[token], experts.gate_up_proj[slot]).chunk(2, -1)
        output = F.linear(experts.act_fn(gate) * up, experts.down_proj[slot])
        sums[slot] = (output.norm(dim=-1) * weights[token, place] * valid[token]).sum()
    return sums.numpy()


class TorchBackend:
    """Builds the same sub-MoE for both uses."""

    def __init__(self, name: str, builder: Callable[[Artifact, Resident], SubMoe]) -> None:
        self.name, self._builder = name, builder

    def _open(self, artifact: Artifact, resident: Resident) -> TorchSession | PlainSession:
        try:
            if artifact.base.projections != ("gate_up", "down") and self._builder is build:
                return PlainSession(artifact, resident)
            return TorchSession(self._builder(artifact, resident), artifact, resident)
        except (ValueError, KeyError) as error:
            raise SessionError(f"the base cannot be rebuilt in torch: {error}") from error

    def open_train(self, artifact: Artifact, resident: Resident) -> TrainSession:
        """See `Backend`."""
        return self._open(artifact, resident)

    def open_evaluate(self, artifact: Artifact, resident: Resident) -> EvaluateSession:
        """See `Backend`."""
        return self._open(artifact, resident)


def backend() -> TorchBackend:
    """The torch backend."""
    return TorchBackend("torch", build)

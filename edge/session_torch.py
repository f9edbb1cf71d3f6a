"""PyTorch behind `Session`: autograd over transformers and stock PEFT. The other backends are held to it.

Letters as in `session.py`, T = B * S tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from edge import objective_torch
from edge.full_router_torch import full_router
from edge.objective_torch import Routed
from edge.plain_torch import PlainSession
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
from edge.submoe_torch import MoeBlock, SubMoe, build
from protocol import names


class TorchSession:
    """One sub-MoE; trains and evaluates."""

    def __init__(self, model: SubMoe, artifact: Artifact, resident: Resident) -> None:
        self._model, self._resident = model, resident
        self._top_k = artifact.base.top_k
        self._values = model.views(lambda parameter: parameter.detach().numpy())
        self._scales = {names.output_scale(layer) for layer in resident}
        self._seen: dict[int, Routed] = {}
        self._outside: dict[int, set[int]] = {}  # beyond the cap of the last step: no gradient
        for parameter in model.trained():
            parameter.requires_grad_(True)

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """See `TrainSession`."""
        for name, alias in self._values.items():
            alias[...] = adapter.get(name, 1.0) if name in self._scales else adapter[name]

    def parameters(self) -> FloatArrays:
        """See `TrainSession`."""
        return dict(self._values)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        # Padding is on the right, so that the causal mask alone keeps it from every valid token.
        hidden = self._model.body(torch.from_numpy(batch.tokens), use_cache=False).last_hidden_state
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat[torch.from_numpy(batch.positions).reshape(-1)]

    @contextlib.contextmanager
    def _routing(self, batch: Batch, terms: Terms) -> Iterator[dict[int, Routed]]:
        """Within it layers route as `terms` want it, and what they did is in the dictionary."""
        valid = torch.from_numpy(batch.valid).reshape(-1)
        seen: dict[int, Routed] = {}
        hooks = []
        for layer, block in self._model.blocks.items():

            def choose(
                gate: nn.Module, args: Any, layer: int = layer, block: MoeBlock = block
            ) -> None:
                hidden = args[0].reshape(-1, args[0].shape[-1])
                logits = hidden @ gate.weight.T
                g = self._model.distribution(logits)
                kept = objective_torch.within_cap(g, valid, terms.cap, self._top_k)
                # Assigned, not added: a recomputed forward sees the same tokens again.
                seen[layer] = Routed(valid, logits, g, kept, kept, kept, kept)
                if terms.cap_where == "both" and len(kept) < len(block.delta):
                    block.restrict(kept)

            def weigh(
                experts: nn.Module, args: Any, layer: int = layer, block: MoeBlock = block
            ) -> tuple[Any, ...]:
                hidden, slot, weight = args[:3]
                if block.moved.kept is not None:
                    slot = block.moved.kept[slot]
                    block.restrict(None)
                weight, counted = objective_torch.most_active(
                    weight, terms.active, self._model.renormalise
                )
                if weight.requires_grad:
                    weight.retain_grad()
                routed = seen[layer]
                routed.slot, routed.weight, routed.counted = slot, weight, counted
                return hidden, slot, weight * block.scale, *args[3:]

            hooks.append(block.gate.register_forward_pre_hook(choose))
            hooks.append(block.experts.register_forward_pre_hook(weigh))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
            for block in self._model.blocks.values():
                block.restrict(None)

    def forward_backward(
        self, batch: Batch, terms: Terms = PLAIN
    ) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """See `TrainSession`."""
        for parameter in self._model.trained():
            parameter.grad = None
        with self._routing(batch, terms) as seen:
            logits = self._model.head(self._hidden(batch))
            loss, objective = objective_torch.answer_losses(
                objective_torch.with_bias(logits, terms, batch.targets.shape[1]),
                torch.from_numpy(batch.targets).reshape(-1),
                torch.from_numpy(batch.weights).reshape(-1),
                terms.label_smoothing,
            )
            if terms.balance or terms.target_balance or terms.z_loss:
                objective = objective + objective_torch.routing_terms(seen, terms, self._top_k)
            objective.backward()
        self._seen = seen
        self._outside = {}
        if terms.cap and terms.cap_where == "backward":
            for layer, ids in self._resident.items():
                kept = set(seen[layer].kept.tolist())
                self._outside[layer] = {e for slot, e in enumerate(ids) if slot not in kept}
        return float(loss.detach()), {layer: r.tokens().numpy() for layer, r in seen.items()}

    def gradients(self) -> FloatArrays:
        """See `TrainSession`."""
        for parameter in self._model.trained():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        found = self._model.views(lambda parameter: parameter.grad.numpy())
        for name, value in found.items():
            parsed = names.parse(name)
            if parsed is not None and parsed.expert in self._outside.get(parsed.layer, ()):
                value[...] = 0
        return found

    def taylor(self) -> dict[int, NDArray[np.float32]]:
        """See `TrainSession`."""
        renormalise = self._model.renormalise
        return {
            layer: objective_torch.removal_change(routed, renormalise)
            for layer, routed in self._seen.items()
        }

    def evaluate(
        self, batch: Batch, adapter: Mapping[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[int, LayerStats]]:
        """See `EvaluateSession`."""
        self.load(adapter)
        valid = torch.from_numpy(batch.valid).reshape(-1)
        full: dict[int, dict[str, Any]] = {}
        norms: dict[int, NDArray[np.float32]] = {}
        hooks = []
        with self._routing(batch, PLAIN) as seen, torch.no_grad():
            for layer, block in self._model.blocks.items():

                def observe(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                    hidden = args[0].reshape(-1, args[0].shape[-1])
                    g = self._model.probabilities(layer, hidden)
                    full[layer] = full_router(g, valid, self._top_k, self._resident[layer])

                def measure(module: nn.Module, args: Any, output: Any, layer: int = layer) -> None:
                    norms[layer] = _output_norms(module, args[0], seen[layer])

                hooks.append(block.gate.register_forward_hook(observe))
                hooks.append(block.experts.register_forward_hook(measure))
            try:
                logits = self._model.head(self._hidden(batch))
            finally:
                for hook in hooks:
                    hook.remove()
        shape = (*batch.positions.shape, logits.shape[-1])
        stats = {n: LayerStats(**found, output_norm=norms[n]) for n, found in full.items()}
        return logits.reshape(shape).numpy(), stats

    def close(self) -> None:
        """See `TrainSession`."""
        self._values, self._seen = {}, {}
        del self._model


def _output_norms(experts: Any, hidden: torch.Tensor, routed: Routed) -> NDArray[np.float32]:
    """Sum over valid tokens of routed weight * norm of the expert's output, [P]. Runs while LoRA is active."""
    sums = torch.zeros(experts.num_experts)
    for slot in range(experts.num_experts):
        token, place = torch.where(routed.slot == slot)
        gate, up = F.linear(hidden[token], experts.gate_up_proj[slot]).chunk(2, -1)
        output = F.linear(experts.act_fn(gate) * up, experts.down_proj[slot])
        weight = routed.weight[token, place] * routed.valid[token]
        sums[slot] = (output.norm(dim=-1) * weight).sum()
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

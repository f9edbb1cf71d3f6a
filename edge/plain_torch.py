"""Sub-MoEs whose experts are small modules of ours, in torch: Switch Transformers, and FFT-MoE beside a dense block.

The slow reference for these two, as `submoe_torch` is for the families whose experts transformers fuses: it knows the
blobs and the names, and nothing of the exported programs. Letters: E experts, P slots of a layer, T tokens, r a slot's
rank (the width of an adapter expert), d hidden, f expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.activations import ACT2FN

from edge import objective_torch
from edge.full_router_torch import full_router
from edge.objective_torch import Routed
from edge.session import (
    PLAIN,
    Artifact,
    Batch,
    FloatArrays,
    LayerStats,
    Resident,
    SessionError,
    Terms,
)
from edge.submoe_torch import load_dense, read_blob, router_of, unpacked
from protocol import fft_moe, lora, names, packing
from protocol.manifest import BaseIndex, Slot


class Expert(nn.Module):
    """One plain expert, down(act(up(x))), or an adapter expert, B silu(A x); its LoRA factors by global name."""

    def __init__(self, base: BaseIndex, layer: int, expert: int, rank: int) -> None:
        super().__init__()
        self.keys, self.factors = {}, nn.ParameterList()
        for projection in base.projections if rank else ():
            out, features = base.features(projection)
            for factor, shape in (("lora_A", (rank, features)), ("lora_B", (out, rank))):
                self.keys[projection, factor] = (
                    names.lora(layer, expert, projection, factor),
                    len(self.factors),
                )
                self.factors.append(nn.Parameter(torch.zeros(shape)))
        self.frozen: dict[str, torch.Tensor] = {}
        self.activation = F.silu
        if base.projections != ("adapter",):
            self.activation = ACT2FN[base.config["dense_act_fn"]]

    def named(self) -> dict[str, nn.Parameter]:
        """Global name -> parameter."""
        return {name: self.factors[place] for name, place in self.keys.values()}

    def _factor(self, projection: str, factor: str) -> torch.Tensor:
        return self.factors[self.keys[projection, factor][1]]

    def _project(self, x: torch.Tensor, projection: str) -> torch.Tensor:
        y = x @ self.frozen[projection].T
        if self.keys:
            a, b = (self._factor(projection, factor) for factor in names.FACTORS)
            y = y + lora.SCALE * (x @ a.T) @ b.T
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, d] -> [T, d]."""
        if self.frozen:
            return self._project(self.activation(self._project(x, "up")), "down")
        a, b = (self._factor("adapter", factor) for factor in names.FACTORS)
        return self.activation(x @ a.T) @ b.T


class Block(nn.Module):
    """Router and resident experts of a layer; `inner`, where given, is the frozen block that they stand beside."""

    def __init__(
        self, experts: list[Expert], router: torch.Tensor, ids: tuple[int, ...], top_k: int
    ) -> None:
        super().__init__()
        self.experts, self.ids, self.top_k = nn.ModuleList(experts), ids, top_k
        self.router, self.inner = router, None
        self.delta = nn.Parameter(torch.zeros(len(ids), router.shape[1]))
        self.scale = nn.Parameter(torch.ones(1))
        self.renormalise = False
        self.valid, self.terms = torch.ones(1), PLAIN
        self.routed: Routed | None = None
        self.stats: dict[str, Any] = {}  # fields of LayerStats

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, d] -> [B, S, d]."""
        x, valid = hidden.reshape(-1, hidden.shape[-1]), self.valid.reshape(-1)
        logits = x @ (self.router[list(self.ids)] + self.delta).T
        p = torch.softmax(logits, -1)
        kept = objective_torch.within_cap(p, valid, self.terms.cap, self.top_k)
        ids = kept if self.terms.cap_where == "both" else torch.arange(len(self.ids))
        weight, slot = torch.softmax(logits[:, ids], -1).topk(self.top_k, -1)
        slot = ids[slot]
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        weight, counted = objective_torch.most_active(weight, self.terms.active, self.renormalise)
        if weight.requires_grad:
            weight.retain_grad()
        self.routed = Routed(valid, logits, p, kept, slot, weight, counted)
        out, norms = torch.zeros_like(x), []
        for place, expert in enumerate(self.experts):
            token, choice = torch.where(slot == place)
            y = expert(x[token])
            share = weight[token, choice, None] * self.scale
            out = out.index_add(0, token, y * share)
            norms.append((y.norm(dim=-1) * weight[token, choice] * valid[token]).sum())
        if not torch.is_grad_enabled():
            full = self.router.clone()
            full[list(self.ids)] += self.delta
            self.stats = full_router(torch.softmax(x @ full.T, -1), valid, self.top_k, self.ids)
            self.stats["output_norm"] = torch.stack(norms).numpy()
        return out.view(hidden.shape) + (0 if self.inner is None else self.inner(hidden))


def build(artifact: Artifact, resident: Resident) -> tuple[nn.Module, dict[int, Block]]:
    """The transformers model with our blocks in place, and these by layer; adapters are zero.

    Raises
    ------
    SessionError
        When a blob does not fit the model class.
    """
    base, shape = artifact.base, artifact.manifest.shape
    dense = unpacked(read_blob(artifact, artifact.manifest.dense), shape.dense)
    config = AutoConfig.for_model(**base.config)
    config.dtype = torch.float32
    kind = AutoModelForSeq2SeqLM if base.architecture == "seq2seq" else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, attn_implementation="eager").eval()
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf == "rotary_emb":
            setattr(model.get_submodule(parent), leaf, type(module)(config))
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    blocks, paths = {}, {}
    for position, (layer, slots) in enumerate(zip(base.moe_layers, shape.slots, strict=True)):
        router, ids = router_of(dense, layer, base)["weight"], resident[layer]
        experts = [
            _expert(artifact, layer, position, e, slot) for e, slot in zip(ids, slots, strict=True)
        ]
        blocks[layer] = Block(experts, router, ids, base.top_k)
        if base.peft is None:
            paths[layer] = fft_moe.BLOCK.format(layer=layer)
        else:
            paths[layer] = base.peft.places[str(layer)] + ".mlp"
            _put(model, paths[layer], blocks[layer])
    load_dense(model, dense)
    if base.peft is None:
        for layer, block in blocks.items():
            block.inner, block.renormalise = model.get_submodule(paths[layer]), True
            _put(model, paths[layer], block)
    return model, blocks


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _expert(artifact: Artifact, layer: int, position: int, expert: int, slot: Slot) -> Expert:
    made = Expert(artifact.base, layer, expert, slot.rank)
    if slot.format != "none":
        blob = read_blob(artifact, artifact.base.experts[slot.format][position][expert])
        for projection in artifact.base.projections:
            packed, scale = blob[f"{projection}.packed"], blob[f"{projection}.scale"]
            weight = packing.dequantize(packed, scale, slot.format)
            if weight.shape != artifact.base.features(projection):
                raise SessionError(
                    f"expert blob of expert {expert}, layer {layer}: {projection} is "
                    f"{list(weight.shape)}, {list(artifact.base.features(projection))} wanted"
                )
            made.frozen[projection] = torch.from_numpy(weight)
    return made


class PlainSession:
    """One such sub-MoE; trains and evaluates."""

    def __init__(self, artifact: Artifact, resident: Resident) -> None:
        self._base = artifact.base
        self._model, self._blocks = build(artifact, resident)
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        self._backward_cap = False  # of the last step
        self._parameters: dict[str, torch.Tensor] = {}
        for layer, block in self._blocks.items():
            for expert in block.experts:
                self._parameters |= expert.named()
            self._parameters |= {f"layers.{layer}.router": block.delta}
            self._parameters |= {names.output_scale(layer): block.scale}
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)

    def _views(self, arrays: Mapping[str, NDArray[np.float32]]) -> FloatArrays:
        views = dict(arrays)
        for layer, block in self._blocks.items():
            rows = views.pop(f"layers.{layer}.router")
            views |= {names.router_row(layer, e): rows[slot] for slot, e in enumerate(block.ids)}
        return views

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """See `TrainSession`."""
        scales = {names.output_scale(layer) for layer in self._blocks}
        for name, alias in self.parameters().items():
            alias[...] = adapter.get(name, 1.0) if name in scales else adapter[name]

    def parameters(self) -> FloatArrays:
        """See `TrainSession`."""
        return self._views({n: p.detach().numpy() for n, p in self._parameters.items()})

    def _logits(self, batch: Batch, terms: Terms = PLAIN) -> torch.Tensor:
        """[B * K, V]."""
        tokens, valid = torch.from_numpy(batch.tokens), torch.from_numpy(batch.valid)
        seq2seq = self._base.architecture == "seq2seq"
        scored = torch.from_numpy((batch.weights > 0).astype(np.float32))
        for layer, block in self._blocks.items():
            decoder = seq2seq and layer >= int(self._base.config["num_layers"])
            block.valid, block.terms = scored if decoder else valid, terms
        if seq2seq:
            targets = torch.from_numpy(batch.targets)
            answered = self._model(input_ids=tokens, attention_mask=valid, labels=targets)
            return answered.logits.flatten(0, 1)
        # Padding is on the right, so that the causal mask alone keeps it from every valid token.
        hidden = self._model.model(tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        return self._model.lm_head(hidden[torch.from_numpy(batch.positions).reshape(-1)])

    def forward_backward(
        self, batch: Batch, terms: Terms = PLAIN
    ) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """See `TrainSession`."""
        for parameter in self._parameters.values():
            parameter.grad = None
        loss, objective = objective_torch.answer_losses(
            objective_torch.with_bias(self._logits(batch, terms), terms, batch.targets.shape[1]),
            torch.from_numpy(batch.targets).reshape(-1),
            torch.from_numpy(batch.weights).reshape(-1),
            terms.label_smoothing,
        )
        seen = self._routed()
        if terms.balance or terms.target_balance or terms.z_loss:
            objective = objective + objective_torch.routing_terms(seen, terms, self._base.top_k)
        objective.backward()
        self._backward_cap = bool(terms.cap) and terms.cap_where == "backward"
        return float(loss.detach()), {layer: r.tokens().numpy() for layer, r in seen.items()}

    def _routed(self) -> dict[int, Routed]:
        return {n: block.routed for n, block in self._blocks.items() if block.routed is not None}

    def gradients(self) -> FloatArrays:
        """See `TrainSession`."""
        for parameter in self._parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        found = self._views({n: p.grad.numpy() for n, p in self._parameters.items()})
        for layer, routed in self._routed().items() if self._backward_cap else ():
            ids = self._blocks[layer].ids
            outside = set(ids) - {ids[slot] for slot in routed.kept.tolist()}
            for name, value in found.items():
                parsed = names.parse(name)
                if parsed is not None and parsed.layer == layer and parsed.expert in outside:
                    value[...] = 0
        return found

    def taylor(self) -> dict[int, NDArray[np.float32]]:
        """See `TrainSession`."""
        return {
            layer: objective_torch.removal_change(routed, self._blocks[layer].renormalise)
            for layer, routed in self._routed().items()
        }

    def evaluate(
        self, batch: Batch, adapter: Mapping[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[int, LayerStats]]:
        """See `EvaluateSession`."""
        self.load(adapter)
        with torch.no_grad():
            logits = self._logits(batch).numpy()
        stats = {layer: LayerStats(**block.stats) for layer, block in self._blocks.items()}
        return logits.reshape(*batch.positions.shape, -1), stats

    def close(self) -> None:
        """See `TrainSession`."""
        self._parameters, self._blocks = {}, {}
        del self._model

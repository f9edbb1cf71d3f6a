"""A sub-MoE in torch that computes routed tokens only: the fast torch backend, for Jetsons and for simulating fleets.

Attention, norms and head are transformers' own; each sparse block is replaced by `RoutedBlock`, whose experts are one
autograd function. The dense part and the dequantised experts are shared by all sessions of a process, of which one is
open at a time. On an accelerator the parameters live there, with a copy on the host for the optimiser.

Letters: T tokens, P slots, E experts, k experts per token, R rank, d hidden, f expert width, n tokens routed to a slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from edge.objective_torch import with_prior
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
from protocol import lora, names, packing
from protocol.manifest import Shape, Slot

MODEL_TYPES = ("mixtral", "olmoe", "qwen3_moe")
"""Families whose sparse block is a softmax router and gated SiLU experts, and nothing else."""
MASKED = -1e30


class Experts(torch.autograd.Function):  # type: ignore[misc]
    """Gated experts of one layer on their routed tokens, forward and backward by hand.

    Frozen weights get no gradient. With W' = W + s B A the products with W' serve both directions; the factors'
    gradients need only [n, R].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        slot: Tensor,
        frozen: tuple[Tensor, Tensor],
        up_a: Tensor,
        up_b: Tensor,
        down_a: Tensor,
        down_b: Tensor,
    ) -> Tensor:
        """x [T, d], weight, slot [T, k], frozen ([P, 2f, d], [P, d, f]), factors [P, R, in], [P, out, R] -> [T, d]."""
        k, slots = slot.shape[1], len(up_a)
        order = torch.argsort(slot.reshape(-1), stable=True)
        counts = torch.bincount(slot.reshape(-1), minlength=slots).tolist()
        token = torch.div(order, k, rounding_mode="floor")
        up = torch.baddbmm(frozen[0], up_b, up_a, alpha=lora.SCALE)
        down = torch.baddbmm(frozen[1], down_b, down_a, alpha=lora.SCALE)
        xs, ws = x[token], weight.reshape(-1)[order]
        f = down.shape[2]
        h, ys = xs.new_empty(len(xs), 2 * f), xs.new_empty(len(xs), x.shape[1])
        at = 0
        for p, n in enumerate(counts):
            if n:
                torch.mm(xs[at : at + n], up[p].t(), out=h[at : at + n])
                at += n
        a = F.silu(h[:, :f]) * h[:, f:]
        at = 0
        for p, n in enumerate(counts):
            if n:
                torch.mm(a[at : at + n], down[p].t(), out=ys[at : at + n])
                at += n
        ctx.save_for_backward(order, token, xs, ws, h, a, up, down, up_a, up_b, down_a, down_b)
        ctx.counts, ctx.tokens, ctx.k = counts, len(x), k
        return torch.zeros_like(x).index_add_(0, token, ys * ws[:, None])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and the four factors."""
        order, token, xs, ws, h, a, up, down, up_a, up_b, down_a, down_b = ctx.saved_tensors
        f, s = a.shape[1], lora.SCALE
        dys, da = dy[token], torch.empty_like(a)
        at = 0
        for p, n in enumerate(ctx.counts):
            if n:
                torch.mm(dys[at : at + n], down[p], out=da[at : at + n])
                at += n
        dweight = torch.empty_like(ws).index_copy_(0, order, (da * a).sum(-1))
        dys = dys * ws[:, None]
        da = da * ws[:, None]
        gate, other = h[:, :f], h[:, f:]
        sigmoid = torch.sigmoid(gate)
        dh = torch.cat(
            (
                da * other * (sigmoid * (1 + gate * (1 - sigmoid))),
                da * (gate * sigmoid),
            ),
            1,
        )
        needs_x = ctx.needs_input_grad[0]
        dxs = torch.empty_like(xs) if needs_x else None
        grads = [torch.zeros_like(t) for t in (up_a, up_b, down_a, down_b)]
        at = 0
        for p, n in enumerate(ctx.counts):
            if not n:
                continue
            rows = slice(at, at + n)
            x_p, a_p, dh_p, dy_p = xs[rows], a[rows], dh[rows], dys[rows]
            torch.mm((dh_p @ up_b[p]).t(), x_p, out=grads[0][p])
            torch.mm(dh_p.t(), x_p @ up_a[p].t(), out=grads[1][p])
            torch.mm((dy_p @ down_b[p]).t(), a_p, out=grads[2][p])
            torch.mm(dy_p.t(), a_p @ down_a[p].t(), out=grads[3][p])
            if dxs is not None:
                torch.mm(dh_p, up[p], out=dxs[rows])
            at += n
        dx = None
        if dxs is not None:
            dx = xs.new_zeros(ctx.tokens, xs.shape[1]).index_add_(0, token, dxs)
        scaled = [g.mul_(s) for g in grads]
        return dx, dweight.view(ctx.tokens, ctx.k), None, None, *scaled


@dataclass
class Seen:
    """What a block notes down while it runs."""

    routed: Tensor | None = None  # [P]
    weight: Tensor | None = None  # [T', k], keeps its gradient for `taylor`
    slot: Tensor | None = None  # [T', k]
    loss: Tensor | None = None  # the router's terms of the objective
    stats: LayerStats | None = None


@dataclass
class Run:
    """What all blocks of one forward pass share."""

    valid: Tensor  # [T]
    terms: Terms
    train: bool
    statistics: bool
    rare: int  # one token in a hundred of the program's batch
    answers: Tensor | None  # places [B * K] whose output counts, for the last block; None: all


class RoutedBlock(nn.Module):  # type: ignore[misc]
    """Stands in for one sparse block. `fill` puts a sub-MoE into it."""

    def __init__(self, router: Tensor, renormalise: bool, top_k: int, last: bool) -> None:
        """`router` [E, d], the base's own."""
        super().__init__()
        self.router, self.renormalise, self.top_k, self.last = router, renormalise, top_k, last
        self.run: Run | None = None
        self.seen = Seen()

    def fill(self, ids: Sequence[int], frozen: tuple[Tensor, Tensor], rank: int) -> None:
        """Take resident experts and make fresh zero parameters for them."""
        self.ids, self.frozen = list(ids), frozen
        p, d, f = len(ids), self.router.shape[1], frozen[1].shape[2]
        self.rows = self.router[self.ids]
        shapes = ((p, rank, d), (p, 2 * f, rank), (p, rank, f), (p, d, rank), (p, d), (1,))
        self.parameters_ = [self.router.new_zeros(shape).requires_grad_() for shape in shapes]
        with torch.no_grad():
            self.parameters_[5].fill_(1.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, d] -> the same shape."""
        run = self.run
        assert run is not None  # set by the session
        x = hidden.reshape(-1, hidden.shape[-1])
        up_a, up_b, down_a, down_b, delta, scale = self.parameters_
        every = x @ (self.rows + delta).t()
        logits = self._capped(every, run) if run.train else every
        if self.closed is not None:
            closed = torch.tensor([self.closed], device=x.device)
            logits = logits.index_fill(1, closed, MASKED)
        g = logits.softmax(-1)
        weight, slot = g.topk(min(self.top_k, len(self.ids)), -1)
        if 0 < run.terms.active < weight.shape[1]:
            weight = weight * (torch.arange(weight.shape[1], device=x.device) < run.terms.active)
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        self.seen = Seen()
        if run.train:
            self.seen.routed = self._routed(weight.detach(), slot, run.valid)
            # Over all residents, also those beyond the cap.
            self.seen.loss = self._router_loss(every, run)
        chosen = run.answers if self.last and not run.statistics else None
        y = self._experts(x, weight, slot, chosen, (up_a, up_b, down_a, down_b)) * scale
        if run.statistics:
            self.seen.stats = self._statistics(x, weight, slot, run)
        return y.view(hidden.shape)

    def _experts(
        self,
        x: Tensor,
        weight: Tensor,
        slot: Tensor,
        chosen: Tensor | None,
        factors: tuple[Tensor, ...],
    ) -> Tensor:
        if chosen is not None:
            x_all, x, weight, slot = x, x[chosen], weight[chosen], slot[chosen]
        if weight.requires_grad:
            weight.retain_grad()
            self.seen.weight, self.seen.slot = weight, slot
        y = Experts.apply(x, weight, slot, self.frozen, *factors)
        if chosen is None:
            return y
        # Nothing reads the other places: this is the last layer.
        return torch.zeros_like(x_all).index_copy(0, chosen, y)

    def _capped(self, logits: Tensor, run: Run) -> Tensor:
        """Within-batch cap on experts, see `Objective.cap`."""
        cap = run.terms.cap
        if not 0 < cap < len(self.ids):
            return logits
        g = logits.detach().softmax(-1)
        tokens = run.valid.sum()
        mass = (g * run.valid[:, None]).sum(0) / tokens
        if run.terms.cap_where == "backward":
            mass = _printed_score(g, run.valid, mass)
        kept = torch.zeros(len(self.ids), dtype=torch.bool, device=logits.device)
        kept[mass.topk(max(cap, min(self.top_k, len(self.ids)))).indices] = True
        if run.terms.cap_where == "both":
            return logits.masked_fill(~kept, MASKED)
        self.kept = kept
        return logits

    def _routed(self, weight: Tensor, slot: Tensor, valid: Tensor) -> Tensor:
        places = ((weight > 0) * valid[:, None]).reshape(-1)
        return places.new_zeros(len(self.ids)).index_add_(0, slot.reshape(-1), places)

    def _router_loss(self, logits: Tensor, run: Run) -> Tensor | None:
        terms, valid = run.terms, run.valid
        if not (terms.balance or terms.target_balance or terms.z_loss):
            return None
        tokens, slots, g = valid.sum(), len(self.ids), logits.softmax(-1)
        loss = logits.new_zeros(())
        mean = (g * valid[:, None]).sum(0) / tokens
        if terms.balance:
            assert self.seen.routed is not None
            share = self.seen.routed / self.seen.routed.sum()
            loss = loss + terms.balance * slots * (share * mean).sum()
        if terms.target_balance:
            layer = self.layer
            target = torch.from_numpy(
                terms.targets.get(layer, np.full(slots, 1 / slots, np.float32))
            ).to(logits.device)
            k = terms.active or self.top_k
            kl = (target * (target.clamp_min(1e-9).log() - mean.clamp_min(1e-9).log())).sum()
            loss = loss + terms.target_balance * math.sqrt(slots / k) * kl
        if terms.z_loss:
            z = torch.logsumexp(logits, -1).square()
            loss = loss + terms.z_loss * (z * valid).sum() / tokens
        return loss

    def _statistics(self, x: Tensor, weight: Tensor, slot: Tensor, run: Run) -> LayerStats:
        valid = run.valid
        full = self.router.clone()
        full[self.ids] += self.parameters_[4].detach()
        g = (x @ full.t()).softmax(-1) * valid[:, None]
        top = torch.zeros_like(g).scatter(1, g.topk(self.top_k, -1).indices, 1.0) * g
        log = torch.where(g > 0, g * torch.log(g.clamp_min(1e-30)), torch.zeros_like(g))
        # The routed experts' outputs once more, one slot at a time: their norms.
        norms = x.new_zeros(len(self.ids))
        factors = [t.detach() for t in self.parameters_[:4]]
        for p in range(len(self.ids)):
            token, place = torch.where(slot == p)
            if len(token):
                y = self._one(x[token], p, factors)
                norms[p] = (y.norm(dim=-1) * weight[token, place] * valid[token]).sum()
        return LayerStats(
            mass=_array(g.sum(0)),
            top=_array(top.sum(0)),
            g_log_g=_array(log.sum(0)),
            missed=float(valid.sum() - g[:, self.ids].sum()),
            output_norm=_array(norms),
            peak=_array(g.amax(0)),
            high=_array(g.topk(min(run.rare, len(g)), 0).values[-1]),
        )

    def _one(self, x: Tensor, p: int, factors: Sequence[Tensor]) -> Tensor:
        up = self.frozen[0][p] + lora.SCALE * factors[1][p] @ factors[0][p]
        down = self.frozen[1][p] + lora.SCALE * factors[3][p] @ factors[2][p]
        gate, other = (x @ up.t()).chunk(2, -1)
        return (F.silu(gate) * other) @ down.t()

    layer: int = 0
    kept: Tensor | None = None
    closed: int | None = None  # a slot that gets no token: what is it worth?


@dataclass
class Body:
    """The dense part of a base with a block per MoE layer, and the experts dequantised so far."""

    model: nn.Module
    blocks: dict[int, RoutedBlock]
    artifact: Artifact
    device: torch.device
    experts: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def expert(self, position: int, expert: int, format: str) -> tuple[Tensor, Tensor]:
        """([2f, d], [d, f]) of an expert, float32."""
        key = (position, expert, format)
        if key not in self.experts:
            base = self.artifact.base
            blob = read_blob(self.artifact, base.experts[format][position][expert])
            both = []
            for projection in ("gate_up", "down"):
                packed, scale = blob[f"{projection}.packed"], blob[f"{projection}.scale"]
                weight = packing.dequantize(packed, scale, format)
                if weight.shape != base.features(projection):
                    raise SessionError(
                        f"expert {expert} of layer {base.moe_layers[position]}: {projection} is "
                        f"{list(weight.shape)}, {list(base.features(projection))} wanted"
                    )
                both.append(torch.from_numpy(weight.astype(np.float32)).to(self.device))
            self.experts[key] = (both[0], both[1])
        return self.experts[key]

    def stacked(
        self, position: int, ids: Sequence[int], slots: Sequence[Slot]
    ) -> tuple[Tensor, Tensor]:
        """([P, 2f, d], [P, d, f]) in slot order."""
        pairs = [self.expert(position, e, slot.format) for e, slot in zip(ids, slots, strict=True)]
        return torch.stack([up for up, _ in pairs]), torch.stack([down for _, down in pairs])


def open_body(artifact: Artifact, device: str = "cpu") -> Body:
    """Build the model around empty blocks; raises SessionError for a family that is not in `MODEL_TYPES`."""
    place = torch.device(device)
    base = artifact.base
    if base.model_type not in MODEL_TYPES:
        raise SessionError(
            f"backend torch-routed: {base.model_type} found, one of {', '.join(MODEL_TYPES)} wanted"
        )
    config = AutoConfig.for_model(**base.config)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    dense = unpacked(read_blob(artifact, artifact.manifest.dense), artifact.manifest.shape.dense)
    renormalise = base.model_type == "mixtral" or bool(base.config.get("norm_topk_prob"))
    blocks = {}
    for layer in base.moe_layers:
        router = router_of(dense, layer, base)["weight"].to(place)
        block = RoutedBlock(
            router, renormalise, base.top_k, layer == base.config["num_hidden_layers"] - 1
        )
        block.layer = layer
        blocks[layer] = block
        model.model.layers[layer].mlp = block
    load_dense(model, dense)
    return Body(model.to(place), blocks, artifact, place)


class RoutedSession:
    """One sub-MoE in the shared body; trains and evaluates."""

    def __init__(self, body: Body, resident: Resident, shape: Shape) -> None:
        self.body, self.resident, self.shape = body, resident, shape
        rank = max(slot.rank for slots in shape.slots for slot in slots)
        for position, (layer, slots) in enumerate(
            zip(body.artifact.base.moe_layers, shape.slots, strict=True)
        ):
            ids = resident[layer]
            body.blocks[layer].fill(ids, body.stacked(position, ids, slots), rank)
        # As the host has them: on a CPU, the parameters themselves.
        self._host = {
            layer: [parameter.detach().cpu() for parameter in block.parameters_]
            for layer, block in body.blocks.items()
        }
        self._values = self._views(self._host)
        self._taylor: dict[int, NDArray[np.float32]] = {}

    def _views(self, tensors: Mapping[int, Sequence[Tensor]]) -> FloatArrays:
        found: FloatArrays = {}
        for (layer, ids), slots in zip(self.resident.items(), self.shape.slots, strict=True):
            parts = [tensor.numpy() for tensor in tensors[layer]]
            for p, (expert, slot) in enumerate(zip(ids, slots, strict=True)):
                if slot.rank:
                    for i, projection in enumerate(("gate_up", "down")):
                        key = (layer, expert, projection)
                        found[names.lora(*key, "lora_A")] = parts[2 * i][p, : slot.rank]
                        found[names.lora(*key, "lora_B")] = parts[2 * i + 1][p, :, : slot.rank]
                found[names.router_row(layer, expert)] = parts[4][p]
            found[names.output_scale(layer)] = parts[5]
        return found

    def load(self, adapter: Mapping[str, NDArray[np.float32]]) -> None:
        """See `TrainSession`."""
        for name, alias in self._values.items():
            if name in adapter:
                alias[...] = adapter[name]
            elif name.endswith("output_scale"):
                alias[...] = 1
            else:
                raise KeyError(name)

    def parameters(self) -> FloatArrays:
        """See `TrainSession`."""
        return dict(self._values)

    def hidden(self, batch: Batch, terms: Terms, *, train: bool, statistics: bool) -> Tensor:
        """Hidden states at the batch's positions, [B * K, d].

        Rows and columns that are padding altogether are at the end and are not computed; their positions give
        something, which must weigh nothing.
        """
        width = batch.tokens.shape[1]
        length = max(1, int(batch.valid.sum(1).max()))
        rows = max(1, int((batch.valid[:, 0] > 0).sum()))
        row, column = np.minimum(batch.positions // width, rows - 1), batch.positions % width
        places = torch.from_numpy(row * length + np.minimum(column, length - 1)).reshape(-1)
        self._push()
        places, device = places.to(self.body.device), self.body.device
        valid = torch.from_numpy(np.ascontiguousarray(batch.valid[:rows, :length]))
        rare = math.ceil(batch.tokens.size / 100)
        unique, back = torch.unique(places, return_inverse=True)
        run = Run(valid.reshape(-1).to(device), terms, train, statistics, rare, unique)
        for block in self.body.blocks.values():
            block.run = run
        tokens = torch.from_numpy(np.ascontiguousarray(batch.tokens[:rows, :length]))
        # Padding is on the right: the causal mask alone keeps it from every valid token.
        hidden = self.body.model.model(tokens.to(device), use_cache=False).last_hidden_state
        return hidden.reshape(rows * length, -1)[unique][back]

    def logits(self, batch: Batch, terms: Terms = PLAIN) -> Tensor:
        """[B * K, V] without gradients and statistics, on the host."""
        with torch.no_grad():
            hidden = self.hidden(batch, terms, train=False, statistics=False)
            return self.body.model.lm_head(hidden).cpu()

    def _push(self) -> None:
        """Bring what the optimiser changed on the host to the device."""
        if self.body.device.type == "cpu":
            return
        with torch.no_grad():
            for layer, block in self.body.blocks.items():
                for parameter, value in zip(block.parameters_, self._host[layer], strict=True):
                    parameter.copy_(value)

    def free_run(self) -> None:
        """Let the model be called as it is: every place counts, nothing is noted down."""
        self._push()
        for block in self.body.blocks.values():
            block.run = Run(torch.ones(1, device=self.body.device), PLAIN, False, False, 1, None)

    def forward_backward(
        self, batch: Batch, terms: Terms = PLAIN
    ) -> tuple[float, dict[int, NDArray[np.float32]]]:
        """See `TrainSession`. The loss is the plain negative log likelihood, the gradients are the objective's."""
        blocks = self.body.blocks
        for block in blocks.values():
            for parameter in block.parameters_:
                parameter.grad = None
        weights = torch.from_numpy(batch.weights).reshape(-1).to(self.body.device)
        # Rows without weight are not worth a product with the vocabulary.
        asked = weights.nonzero()[:, 0]
        hidden = self.hidden(batch, terms, train=True, statistics=False)[asked]
        logits = self.body.model.lm_head(hidden)
        if terms.logit_bias is not None:
            first = (asked % batch.targets.shape[1] == 0).to(logits.dtype)
            logits = torch.where(first[:, None] > 0, with_prior(logits, terms.logit_bias), logits)
        log = F.log_softmax(logits, -1)
        targets = torch.from_numpy(batch.targets).reshape(-1).to(self.body.device)[asked]
        share = weights[asked] / weights.sum()
        nll = -(log.gather(1, targets[:, None])[:, 0] * share).sum()
        loss = nll
        if terms.label_smoothing:
            even = -(log.mean(-1) * share).sum()
            loss = (1 - terms.label_smoothing) * nll + terms.label_smoothing * even
        router = [block.seen.loss for block in blocks.values() if block.seen.loss is not None]
        if router:
            loss = loss + torch.stack(router).mean()
        loss.backward()
        routed = {}
        for layer, block in blocks.items():
            assert block.seen.routed is not None
            routed[layer] = _array(block.seen.routed)
            if terms.cap_where == "backward" and block.kept is not None:
                for parameter in block.parameters_[:5]:
                    if parameter.grad is not None:
                        parameter.grad[~block.kept] = 0
            block.kept = None
            self._taylor[layer] = _taylor(block)
        return float(nll.detach()), routed

    def taylor(self) -> dict[int, NDArray[np.float32]]:
        """First-order change of the last step's loss without each expert, see `protocol.update.STATS`; [P]."""
        return dict(self._taylor)

    def gradients(self) -> FloatArrays:
        """See `TrainSession`."""
        for block in self.body.blocks.values():
            for parameter in block.parameters_:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        found = {
            layer: [parameter.grad.cpu() for parameter in block.parameters_]
            for layer, block in self.body.blocks.items()
        }
        return self._views(found)

    def evaluate(
        self, batch: Batch, adapter: Mapping[str, NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], dict[int, LayerStats]]:
        """See `EvaluateSession`."""
        self.load(adapter)
        with torch.no_grad():
            hidden = self.hidden(batch, PLAIN, train=False, statistics=True)
            logits = self.body.model.lm_head(hidden)
        stats = {}
        for layer, block in self.body.blocks.items():
            assert block.seen.stats is not None
            stats[layer] = block.seen.stats
        return _array(logits.view(*batch.positions.shape, -1)), stats

    def close(self) -> None:
        """See `TrainSession`."""
        self._values = {}


def _printed_score(g: Tensor, valid: Tensor, mean: Tensor) -> Tensor:
    """HFedMoE's score of a batch (arXiv 2601.00583, eq 3-5, 10-11, 14), lambda 0.5, beta 0.1; [P]."""
    there = valid > 0
    kl = (g[there] * (g[there].clamp_min(1e-30) / mean.clamp_min(1e-30)).log()).mean(0)
    return 0.5 * mean + 0.5 * g[there].amax(0) - 0.1 * kl


def _taylor(block: RoutedBlock) -> NDArray[np.float32]:
    weight, slot = block.seen.weight, block.seen.slot
    if weight is None or weight.grad is None or slot is None:
        return np.zeros(len(block.ids), np.float32)
    w, dw = weight.detach(), weight.grad
    change = w * dw
    if block.renormalise and w.shape[1] > 1:
        # The others take over; who is alone (one active expert) has nobody who could.
        others = w.sum(-1, keepdim=True) - w
        rest = change.sum(-1, keepdim=True) - change - dw * others
        alone = others <= 0
        change = torch.where(alone, change, w * rest / others.masked_fill(alone, 1.0))
    total = change.new_zeros(len(block.ids))
    return _array(total.index_add_(0, slot.reshape(-1), change.abs().reshape(-1)))


def _array(tensor: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = tensor.cpu().numpy()
    return found


class RoutedBackend:
    """Shares one body among its sessions: only one of them is open at a time. `device` is torch's name of one."""

    name = "torch-routed"

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._body: Body | None = None

    def body(self, artifact: Artifact) -> Body:
        """The body of the artifact's base, built on first use."""
        body = self._body
        if body is None or body.artifact.base.base != artifact.base.base:
            body = self._body = open_body(artifact, self._device)
        body.artifact = artifact
        return body

    def _open(self, artifact: Artifact, resident: Resident) -> RoutedSession:
        try:
            return RoutedSession(self.body(artifact), resident, artifact.manifest.shape)
        except (ValueError, KeyError) as error:
            raise SessionError(f"the base cannot be rebuilt in torch: {error}") from error

    def open_train(self, artifact: Artifact, resident: Resident) -> RoutedSession:
        """See `Backend`."""
        return self._open(artifact, resident)

    def open_evaluate(self, artifact: Artifact, resident: Resident) -> RoutedSession:
        """See `Backend`."""
        return self._open(artifact, resident)


def backend() -> RoutedBackend:
    """The fast torch backend."""
    return RoutedBackend()

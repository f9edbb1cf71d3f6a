"""The graph that generates: a chunk of T tokens against a key-value cache of C places, weights and adapter as inputs.

The cache is an input that the graph only reads: it gives back the keys and values of its T tokens, and whoever calls it
writes those T columns. So no step copies the cache. Prefill (T > 1) and decoding (T = 1) are the same graph.

Letters: T tokens of a chunk, C cache places, H key-value heads, G query heads of each, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram, export
from torch.func import functional_call
from transformers import AttentionInterface

from export import graph_passes, local_objective
from export.families.family import Family, FamilyError
from export.train_graph import SubModel, example
from protocol.manifest import BaseIndex, Shape, TensorSpec

ATTENTION = "expertfleet_cache"
FAR = -1e30
"""Added to the scores of places that must not be seen. Finite, so that no row can become NaN."""
BATCH_INPUTS = ("tokens", "valid", "positions", "targets", "weights")


class Wires:
    """What attention reads beside its activations, and the keys and values it makes, by layer."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}
        self.new: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.places = torch.zeros(0)

    def start(self, given: dict[str, Tensor]) -> None:
        """Begin a forward pass over these inputs."""
        self.given, self.new, self.masks = given, {}, {}
        self.places = given["start"] + torch.arange(given["tokens"].shape[1])


class DecodeModel(nn.Module):
    """The sub-MoE of a shape, generating. `specs` gives the meaning of the positional inputs of `forward`.

    Inputs: `tokens` int64 [1, T], `start` int64 [1] (tokens that the cache holds), `last` int64 [1] (place in the chunk
    whose logits are wanted), `cache.l.key` float32 [H, D, C] and `cache.l.value` [H, C, D] for each layer, then weights
    and adapter as `protocol.manifest.Program` has them. Outputs: `logits` [1, V], then `new.l.key` [H, D, T] and
    `new.l.value` [H, T, D].

    Raises
    ------
    FamilyError
        A base with an encoder.
    """

    def __init__(
        self, base: BaseIndex, family: Family, shape: Shape, chunk: int, context: int
    ) -> None:
        super().__init__()
        if base.architecture != "causal":
            raise FamilyError(
                f"{base.model_type}: only causal bases generate, this one is {base.architecture}"
            )
        sub = SubModel(base, family, replace(shape, batch=1, sequence=chunk, answers=1), False)
        sub.model.config._attn_implementation = ATTENTION
        self.__dict__["sub"], self.__dict__["wires"] = sub, Wires()
        for module in sub.model.modules():
            if hasattr(module, "layer_idx"):
                module.__dict__["wires"] = self.wires
        self.base, self.shape, self.chunk, self.context = base, shape, chunk, context
        self.adapter = sub.adapter
        training = (s.name for s in sub.specs if local_objective.is_input(s.name))
        apart = {*BATCH_INPUTS, *training}
        weights = [spec for spec in sub.specs if spec.name not in apart]
        self.specs = [
            TensorSpec(name="tokens", shape=(1, chunk), dtype="int64"),
            TensorSpec(name="start", shape=(1,), dtype="int64"),
            TensorSpec(name="last", shape=(1,), dtype="int64"),
            *weights,
        ]
        self.layers: tuple[int, ...] = ()
        self.layers, caches = self._caches()
        self.specs[3:3] = caches

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits and what has to be written into the cache."""
        given = dict(zip([spec.name for spec in self.specs], inputs, strict=True))
        self.wires.start(given)
        arguments = {
            "input_ids": given["tokens"],
            "position_ids": self.wires.places.unsqueeze(0),
            "use_cache": False,
        }
        prefix = f"{self.sub.model.base_model_prefix}."
        floats = self.sub.bind(given)
        body = {n.removeprefix(prefix): t for n, t in floats.items() if n.startswith(prefix)}
        hidden = functional_call(self.sub.model.base_model, body, (), arguments).last_hidden_state
        logits = self.sub.answer(hidden[0].index_select(0, given["last"]), given)
        return logits, *(tensor for layer in self.layers for tensor in self.wires.new[layer])

    def _caches(self) -> tuple[tuple[int, ...], list[TensorSpec]]:
        """The layers with a cache and its inputs, found by sending one token without values through the model."""
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            self.forward(*example(self.specs))
        specs = []
        for layer, (key, value) in sorted(self.wires.new.items()):
            (heads, size, _), wide = key.shape, value.shape[2]
            shapes = {"key": (heads, size, self.context), "value": (heads, self.context, wide)}
            specs += [
                TensorSpec(name=f"cache.{layer}.{part}", shape=shape, dtype="float32")
                for part, shape in shapes.items()
            ]
        return tuple(sorted(self.wires.new)), specs

    def output_names(self) -> tuple[str, ...]:
        """What `forward` returns, by name."""
        parts = ("key", "value")
        return ("logits", *(f"new.{layer}.{part}" for layer in self.layers for part in parts))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of a chunk's tokens over the cache and over each other, as transformers calls it.

    Parameters
    ----------
    query : [1, H * G, T, D]
    key : [1, H, T, D]
    value : [1, H, T, D of values]
    s_aux : logit of a place that takes attention and gives nothing, for each query head

    Returns
    -------
    [1, T, H * G, D of values], None
    """
    wires: Wires = module.__dict__["wires"]
    layer = int(module.layer_idx)
    _, heads, tokens, size = query.shape
    new_key, new_value = key[0].transpose(1, 2), value[0]
    kv = new_value.shape[0]
    wires.new[layer] = (new_key, new_value)
    scale = size**-0.5 if scaling is None else scaling
    q = (query[0] * scale).contiguous().view(kv, heads // kv * tokens, size)  # [H, G * T, D]
    past_mask, new_mask = _masks(wires, tokens, heads // kv, sliding_window)
    scores = torch.bmm(q, new_key)
    past = wires.given.get(f"cache.{layer}.key")
    if past is not None:
        scores = torch.cat((torch.bmm(q, past), scores), -1)
        mask = torch.cat((past_mask, new_mask), -1)
    else:
        mask = new_mask
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if s_aux is not None:
        sink = s_aux.reshape(kv, -1, 1).expand(kv, heads // kv, tokens).reshape(kv, -1, 1)
        scores = torch.cat((scores, sink), -1)
    share = torch.softmax(scores, -1)
    there = 0 if past is None else past.shape[-1]
    # Split before it is merged, or a symbolic T asks for a guard.
    rows = (kv, heads // kv, tokens, new_value.shape[-1])
    out = torch.bmm(share[..., there : there + tokens], new_value).view(rows)
    if past is not None:
        out = out + torch.bmm(share[..., :there], wires.given[f"cache.{layer}.value"]).view(rows)
    return out.flatten(0, 1).transpose(0, 1).unsqueeze(0), None


AttentionInterface.register(ATTENTION, attend)


def _masks(
    wires: Wires, tokens: int, group: int, window: int | None
) -> tuple[Tensor | None, Tensor]:
    """What is added to the scores: [G * T, C] of the cache and [G * T, T] of the chunk, rows as the queries' are."""
    width = window or 0
    if width not in wires.masks:
        places = wires.places
        row, column = torch.arange(tokens).unsqueeze(1), torch.arange(tokens).unsqueeze(0)
        hidden = column > row
        if width:
            hidden = hidden | (column <= row - width)
        past_hidden = None
        keys = [t for n, t in wires.given.items() if n.startswith("cache.") and n.endswith(".key")]
        if keys:
            held = torch.arange(keys[0].shape[-1]).unsqueeze(0)  # [1, C]
            past_hidden = (held >= wires.given["start"]).expand(tokens, -1)
            if width:
                past_hidden = past_hidden | (held <= places.unsqueeze(1) - width)
            past_hidden = (past_hidden.to(torch.float32) * FAR).repeat(group, 1)
        wires.masks[width] = (past_hidden, (hidden.to(torch.float32) * FAR).repeat(group, 1))
    return wires.masks[width]


def capture(model: DecodeModel) -> ExportedProgram:
    """The forward graph for chunks of exactly `model.chunk` tokens."""
    with torch.no_grad():
        program = export(model, example(model.specs), strict=False).run_decompositions()
    graph_passes.simplify(program)
    return program

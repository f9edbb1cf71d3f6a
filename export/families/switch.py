"""Switch Transformers (Fedus et al. 2021): encoder and decoder, top-1 router, plain ReLU experts.

Layers are numbered through both stacks: block i of the encoder is layer i, block j of the decoder is layer
`num_layers` + j. Switch-base-8 has 12 blocks in each, so that its MoE layers are 1, 3, .. 11 and 13, 15, .. 23.

Every token reaches its expert here. transformers drops the tokens of a row beyond the first `expert_capacity` (64 in
all published checkpoints) that chose the same expert, and they pass through the residual alone: rows longer than that
may give other logits there, unless the model is loaded with a larger `expert_capacity`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.families.family import Config, Family, FamilyError, Placed, softmax_top_k
from protocol.manifest import PeftLayout

MODEL_TYPE = "switch_transformers"
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh"}


def _sparse(blocks: int, sparse: int) -> list[int]:
    """Blocks of one stack that hold experts, as transformers' SwitchTransformersStack decides.

    >>> _sparse(12, 6), _sparse(2, 2), _sparse(3, 0)
    ([1, 3, 5, 7, 9, 11], [0, 1], [1])
    """
    step = blocks // sparse if sparse > 0 else blocks
    return [i for i in range(blocks) if step == 1 or (step > 0 and i % step == 1)]


def places(config: Config) -> dict[int, str]:
    """MoE layer -> path of the feed-forward part of its block."""
    blocks = int(config["num_layers"])
    after = config.get("num_decoder_layers")
    after = blocks if after is None else int(after)
    encoder = _sparse(blocks, int(config.get("num_sparse_encoder_layers", 3)))
    decoder = _sparse(after, int(config.get("num_sparse_decoder_layers", 3)))
    return {i: f"encoder.block.{i}.layer.1" for i in encoder} | {
        blocks + i: f"decoder.block.{i}.layer.2" for i in decoder
    }


def adapt(model: nn.Module) -> None:
    """Look up position biases by distance instead of computing a logarithm per pair in the graph.

    The logarithm is rounded down to a bucket: runtimes that differ in its last bit would differ in the bucket.
    """
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False):
            reach = module.relative_attention_max_distance  # farther away is all the same
            buckets = module._relative_position_bucket(
                torch.arange(-reach, reach + 1),
                bidirectional=not module.is_decoder,
                num_buckets=module.relative_attention_num_buckets,
                max_distance=reach,
            )
            module.compute_bias = partial(_bias, module, buckets, reach)


def _bias(attention: Any, buckets: Tensor, reach: int, queries: int, keys: int, **_: Any) -> Tensor:
    """[1, heads, queries, keys]."""
    by_distance = attention.relative_attention_bias(buckets)  # [2 * reach + 1, heads]
    distance = torch.arange(keys).unsqueeze(0) - torch.arange(queries).unsqueeze(1)
    return F.embedding(distance.clamp(-reach, reach) + reach, by_distance).permute(2, 0, 1)[None]


def family(config: Config, where: str) -> Family:
    """The family of one checkpoint: where its layers are depends on its configuration.

    Raises
    ------
    FamilyError
        A router with a bias, a head that is not tied, or an activation that no published checkpoint has.
    """
    if config.get("router_bias"):
        raise FamilyError(f"{where}: Switch routers with a bias are not supported")
    if not config.get("tie_word_embeddings", True):
        raise FamilyError(f"{where}: Switch models with a head of their own are not supported")
    activation = str(config.get("dense_act_fn", "relu"))
    if activation not in ACTIVATIONS:
        raise FamilyError(
            f"{where}: dense_act_fn '{activation}' found, one of {', '.join(ACTIVATIONS)} wanted"
        )
    at, experts = places(config), int(config["num_experts"])
    peft = "base_model.model.{place}.mlp."
    keys = {
        projection: {
            factor: f"{peft}experts.expert_{{expert}}.{module}.{factor}.weight"
            for factor in ("lora_A", "lora_B")
        }
        for projection, module in (("up", "wi"), ("down", "wo"))
    }
    return Family(
        model_type=MODEL_TYPE,
        fused={},
        split={
            "up": (Placed("{place}.mlp.experts.expert_{expert}.wi.weight", at),),
            "down": (Placed("{place}.mlp.experts.expert_{expert}.wo.weight", at),),
        },
        router=Placed("{place}.mlp.router.classifier.weight", at),
        block=Placed("{place}.mlp", at),
        num_experts=lambda config: int(config["num_experts"]),
        top_k=lambda config: 1,
        intermediate=lambda config: int(config["d_ff"]),
        moe_layers=lambda config: tuple(places(config)),
        route=softmax_top_k(lambda config: 1, lambda config: False),
        # Tied to the embeddings, the head sees states scaled down.
        logits=lambda logits, config: logits * config["d_model"] ** -0.5,
        activation=lambda config: activation,
        adapt=adapt,
        projections=("up", "down"),
        architecture="seq2seq",
        hidden=lambda config: int(config["d_model"]),
        peft=PeftLayout(
            target_parameters=(),
            target_modules=tuple(f"expert_{e}.{m}" for e in range(experts) for m in ("wi", "wo")),
            modules_to_save=("classifier",),
            lora=keys,
            router=f"{peft}router.classifier.weight",
            base_model_class="SwitchTransformersForConditionalGeneration",
            parent_library="transformers.models.switch_transformers.modeling_switch_transformers",
            places={str(layer): place for layer, place in at.items()},
        ),
    )

"""A tiny base made by hand, sliced into a store as `export.build` does. Without programs: torch needs none."""

import hashlib
import json

import numpy as np
import pytest

from protocol import PROTOCOL_VERSION, int4, tensors
from protocol.manifest import (
    BaseIndex,
    Blob,
    Manifest,
    MemoryPlan,
    PeftLayout,
    Program,
    Shape,
    to_json,
)

TOPICS = {
    "sport": "the team won the match after a late goal by the captain",
    "science": "the laboratory measured the spectrum of a distant galaxy",
    "finance": "the bank raised its rate and shares fell on the market",
}


def put(blobs, data):
    sha = hashlib.sha256(data).hexdigest()
    (blobs / sha).write_bytes(data)
    return Blob(sha256=sha, bytes=len(data))


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = [f"Text: {value}\nTopic: {key}" for key, value in TOPICS.items()]
    tokenizer.train_from_iterator(text * 4, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tokenizer):
    """The whole base as transformers sees it, its experts rounded to what the blobs hold."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    config._experts_implementation = "eager"
    model = OlmoeForCausalLM._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            if ".experts." in name:
                for row in parameter:
                    row.copy_(torch.from_numpy(int4.dequantize(*int4.quantize(row.numpy()))))
            parameter.copy_(parameter.half().float() if "experts" not in name else parameter)
    return model


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory, tokenizer, tiny_model):
    """STORE with base.json, blobs and the manifest of a profile `tiny` with 4 and 3 slots."""
    root = tmp_path_factory.mktemp("store")
    blobs = root / "blobs"
    blobs.mkdir()
    config = tiny_model.config
    state = {n: p.detach().numpy() for n, p in tiny_model.named_parameters()}
    experts, dense = [], {}
    for name, value in state.items():
        if ".experts." not in name:
            dense[name] = value.astype(np.float16)
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}.mlp"
        dense[f"layers.{layer}.router"] = state[f"{block}.gate.weight"].astype(np.float16)
        row = []
        for e in range(config.num_experts):
            parts = {}
            for projection in ("gate_up", "down"):
                packed, scale = int4.quantize(state[f"{block}.experts.{projection}_proj"][e])
                parts[f"{projection}.packed"], parts[f"{projection}.scale"] = packed, scale
            row.append(put(blobs, tensors.encode(parts)))
        experts.append(tuple(row))
    dense_blob = put(blobs, tensors.encode(dense))
    tokenizer_blob = put(blobs, tokenizer.to_str().encode())
    prefix = "base_model.model.model.layers.{layer}.mlp"
    base = BaseIndex(
        protocol=PROTOCOL_VERSION,
        base="b" * 64,
        model_type="olmoe",
        config=json.loads(config.to_json_string(use_diff=False)),
        moe_layers=tuple(range(config.num_hidden_layers)),
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        group=int4.GROUP,
        dense=dense_blob,
        tokenizer=tokenizer_blob,
        experts=tuple(experts),
        routing_prior=tuple((1 / 6,) * 6 for _ in range(2)),
        peft=PeftLayout(
            target_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            modules_to_save=("gate",),
            lora={
                "gate_up": {
                    "lora_A": prefix + ".experts.base_layer.lora_A.weight",
                    "lora_B": prefix + ".experts.base_layer.lora_B.weight",
                },
                "down": {
                    "lora_A": prefix + ".experts.lora_A.weight",
                    "lora_B": prefix + ".experts.lora_B.weight",
                },
            },
            router=prefix + ".gate.weight",
            base_model_class="OlmoeForCausalLM",
            parent_library="transformers.models.olmoe.modeling_olmoe",
        ),
    )
    program = Program(
        blob=tokenizer_blob,  # there is no program; any blob does
        method="forward",
        inputs=(),
        parameters=(),
        outputs=("loss",),
        arena_bytes=0,
    )
    mib = 1 << 20
    manifest = Manifest(
        protocol=PROTOCOL_VERSION,
        base=base.base,
        profile="tiny",
        shape=Shape(batch=4, sequence=32, answers=2, rank=4, group=int4.GROUP, slots=(4, 3)),
        train=program,
        evaluate=program,
        dense=dense_blob,
        tokenizer=tokenizer_blob,
        memory=MemoryPlan(
            budget=400 * mib,
            arena=mib,
            inputs=mib,
            parameters=mib,
            optimizer=mib,
            outputs=mib,
            runtime=mib,
        ),
        experts={"0": (0, 2, 3, 5), "1": (1, 2, 4)},
    )
    (root / "base.json").write_bytes(to_json(base))
    (root / "tiny").mkdir()
    (root / "tiny" / "manifest.json").write_bytes(to_json(manifest))
    return root


@pytest.fixture(scope="session")
def artifact(tiny_store):
    from edge.session import Artifact
    from protocol.manifest import read_base, read_manifest

    return Artifact(
        read_base(tiny_store / "base.json"),
        read_manifest(tiny_store / "tiny" / "manifest.json"),
        tiny_store / "blobs",
    )

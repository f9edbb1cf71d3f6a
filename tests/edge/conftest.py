"""A tiny base, sliced in all three formats, as two profiles of mixed slots: `tiny` has no programs, `runtime` has."""

import dataclasses

import pytest

from protocol import PROTOCOL_VERSION
from protocol.manifest import (
    Manifest,
    MemoryPlan,
    Program,
    Shape,
    Slot,
    read_base,
    read_manifest,
    to_json,
)

TOPICS = {
    "sport": "the team won the match after a late goal by the captain",
    "science": "the laboratory measured the spectrum of a distant galaxy",
    "finance": "the bank raised its rate and shares fell on the market",
}
SLOTS = (
    tuple(Slot(format=f, rank=r) for f, r in (("int8", 4), ("int4", 4), ("nf4", 2), ("int4", 0))),
    tuple(Slot(format=f, rank=r) for f, r in (("int4", 4), ("int8", 2), ("nf4", 0))),
)


@pytest.fixture(scope="session")
def tokenizer():
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
def tiny_checkpoint(tmp_path_factory, tokenizer):
    """A random OLMoE with 6 experts in each of 2 layers."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
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
    model = OlmoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory, tiny_checkpoint):
    """STORE with base.json, blobs and the manifest of profile `tiny`: 4 and 3 slots, no program."""
    from export import families
    from export.blob_store import BlobStore
    from export.checkpoint import Checkpoint
    from export.slice_base import slice_base

    root = tmp_path_factory.mktemp("store")
    checkpoint = Checkpoint(tiny_checkpoint)
    family = families.of(checkpoint.config, str(tiny_checkpoint))
    formats = ("int4", "nf4", "int8")
    base = slice_base(checkpoint, family, BlobStore(root), lambda stage: None, formats)
    program = Program(
        blob=base.tokenizer,  # there is no program; any blob does
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
        shape=Shape(batch=4, sequence=32, answers=2, dense="int8", slots=SLOTS),
        train=program,
        evaluate=program,
        dense=base.dense["int8"],
        tokenizer=base.tokenizer,
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

    return Artifact(
        read_base(tiny_store / "base.json"),
        read_manifest(tiny_store / "tiny" / "manifest.json"),
        tiny_store / "blobs",
    )


@pytest.fixture(scope="session")
def lowered(tiny_store, artifact):
    """The same slots with both programs, also in the store as profile `runtime`."""
    from export import families
    from export.blob_store import BlobStore
    from export.programs import lower_programs

    family = families.of(artifact.base.config, "here")
    store = BlobStore(tiny_store)
    made = lower_programs(artifact.base, family, artifact.manifest.shape, store, lambda stage: None)
    manifest = dataclasses.replace(
        artifact.manifest, profile="runtime", train=made.train, evaluate=made.evaluate
    )
    (tiny_store / "runtime").mkdir(exist_ok=True)
    (tiny_store / "runtime" / "manifest.json").write_bytes(to_json(manifest))
    return dataclasses.replace(artifact, manifest=manifest)


@pytest.fixture(scope="session")
def whole(tiny_store, artifact):
    """The tiny artifact with the programs that profile the whole model."""
    from export import families
    from export.blob_store import BlobStore
    from export.profile_programs import lower_profiling

    family, store = families.of(artifact.base.config, "here"), BlobStore(tiny_store)
    made = lower_profiling(artifact.base, family, artifact.manifest.shape, store)
    manifest = dataclasses.replace(artifact.manifest, profiling=made)
    return dataclasses.replace(artifact, manifest=manifest)

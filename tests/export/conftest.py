import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}


def write_checkpoint(folder: Path, **changes) -> Path:
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**{**TINY, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["the cat sat on the mat"] * 9,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<end>", "<pad>"], initial_alphabet=alphabet
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def make_checkpoint():
    return write_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def small_profile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / "small.toml"
    path.write_text(
        'name = "small"\ndescription = "for tests"\nmemory_mb = 64\nbudget_mb = 32\n'
        "flash_mb = 100\nflash_budget_mb = 100\n"
        "gflops = 1.0\nmemory_gb_s = 1.0\ndownlink_mbit = 1.0\nuplink_mbit = 1.0\nuplink_mb = 64\ndeadline_s = 600\n"
        'backend = "executorch"\nrank = 4\nsequence = 16\nbatch = 2\nsources = ["none"]\n'
    )
    return path


@pytest.fixture(scope="session")
def store(tiny_checkpoint, small_profile, tmp_path_factory) -> Path:
    """An artifact with 3 of 4 experts in layer 0 and 2 of 4 in layer 1."""
    from export.build import main

    out = tmp_path_factory.mktemp("store")
    selection = out / "selection.json"
    selection.write_text(json.dumps({"layers": {"0": [0, 1, 3], "1": [1, 2]}}))
    arguments = ["--checkpoint", str(tiny_checkpoint), "--profile", str(small_profile)]
    assert main([*arguments, "--out", str(out), "--experts", str(selection)]) == 0
    return out

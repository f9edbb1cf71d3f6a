"""ExecuTorch against torch on programs that `export.build` really wrote: loss, statistics, adapter after 20 steps."""

import dataclasses
import json

import numpy as np
import pytest

from edge import slots
from edge.adamw import AdamW
from edge.data import Row, prompter, training_batches
from edge.run import read_tokenizer
from edge.session import Artifact, SessionError, load_backend
from protocol import lora, names
from protocol.manifest import read_base, read_manifest
from protocol.messages import Task

RESIDENT = {0: (3, 0, 2), 1: (1, 2)}
TASK = Task(labels=("sport", "science", "finance"))
PROFILE = """
name = "small"
description = "for tests"
memory_mb = 64
budget_mb = 32
flash_mb = 100
flash_budget_mb = 100
gflops = 1.0
memory_gb_s = 1.0
downlink_mbit = 1.0
uplink_mbit = 1.0
uplink_mb = 64
deadline_s = 600
backend = "executorch"
rank = 4
sequence = 24
batch = 3
sources = ["none"]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """An artifact with 3 slots in layer 0 and 2 in layer 1, of a base of 4 experts a layer."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from export.build import main

    root = tmp_path_factory.mktemp("exported")
    torch.manual_seed(1)
    config = OlmoeConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    model = OlmoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(root / "checkpoint")
    tokenizer.save(str(root / "checkpoint" / "tokenizer.json"))
    (root / "small.toml").write_text(PROFILE)
    chosen = root / "experts.json"
    chosen.write_text(json.dumps({"layers": {"0": [0, 2, 3], "1": [1, 2]}}))
    command = ["--checkpoint", str(root / "checkpoint"), "--profile", str(root / "small.toml")]
    assert main([*command, "--out", str(root / "store"), "--experts", str(chosen)]) == 0
    store = root / "store"
    return Artifact(
        read_base(store / "base.json"),
        read_manifest(store / "small" / "manifest.json"),
        store / "blobs",
    )


@pytest.fixture(scope="module")
def setting(exported):
    """(prompter, rows, adapter with small random values)."""
    shape, base = exported.manifest.shape, exported.base
    tokenizer = read_tokenizer(exported.path(exported.manifest.tokenizer))
    prompts = prompter(tokenizer, TASK, shape.batch, shape.sequence, shape.answers)
    words = "the bank team galaxy rate goal spectrum market captain".split()
    rng = np.random.default_rng(3)
    rows = [Row(" ".join(rng.choice(words, 4)), TASK.labels[i % 3]) for i in range(30)]
    adapter = {}
    for name in slots.adapter_names(RESIDENT):
        found = names.parse(name)
        if found.projection is None:
            adapter[name] = rng.normal(0, 0.02, base.hidden).astype(np.float32)
        elif found.factor == "lora_A":
            adapter[name] = lora.fresh_a(name, shape.rank, base.features(found.projection)[1])
        else:
            size = (base.features(found.projection)[0], shape.rank)
            adapter[name] = rng.normal(0, 0.02, size).astype(np.float32)
    return prompts, rows, slots.slot_arrays(adapter, RESIDENT, base, shape)


def trained(backend, artifact, setting, steps):
    prompts, rows, adapter = setting
    session = backend.open_train(artifact, RESIDENT)
    session.load(adapter)
    parameters = session.parameters()
    optimizer = AdamW({n: 3e-4 if n.endswith(".router") else 3e-3 for n in parameters})
    losses, routed = [], []
    for batch in training_batches(prompts, rows, steps, np.random.default_rng(0)):
        loss, counts = session.forward_backward(batch)
        optimizer.step(parameters, session.gradients())
        losses.append(loss)
        routed.append(counts)
    result = {n: v.copy() for n, v in parameters.items()}
    session.close()
    return losses, routed, result


def test_executorch_trains_as_torch_does(exported, setting):
    reference, runtime = load_backend("torch"), load_backend("executorch")
    assert (reference.name, runtime.name) == ("torch", "executorch")
    losses, routed, wanted = trained(reference, exported, setting, 20)
    found_losses, found_routed, found = trained(runtime, exported, setting, 20)
    np.testing.assert_allclose(found_losses, losses, atol=1e-4)
    assert losses[-1] < losses[0]
    for one, other in zip(routed, found_routed, strict=True):
        for layer in RESIDENT:
            np.testing.assert_array_equal(one[layer], other[layer])
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert (value != setting[2][name]).any()
        np.testing.assert_allclose(found[name], value, atol=1e-3, err_msg=name)


def test_executorch_really_ran(exported, setting, monkeypatch):
    """Autograd is never used: torch only carries the runtime's memory."""
    import torch

    def refuse(*_, **__):
        raise AssertionError("autograd was used")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    losses, _, _ = trained(load_backend("executorch"), exported, setting, 2)
    assert np.isfinite(losses).all()
    with pytest.raises(AssertionError, match="autograd"):
        trained(load_backend("torch"), exported, setting, 1)


def test_executorch_measures_as_torch_does(exported, setting):
    prompts, rows, adapter = setting
    batch = prompts.assemble(rows[:3], None)
    results = []
    for name in ("torch", "executorch"):
        session = load_backend(name).open_evaluate(exported, RESIDENT)
        results.append(session.evaluate(batch, adapter))
        again, _ = session.evaluate(batch, {n: 0 * v for n, v in adapter.items()})
        assert np.abs(again - results[-1][0]).max() > 1e-3
        session.close()
    (logits, stats), (found, found_stats) = results
    np.testing.assert_allclose(found, logits, atol=1e-4)
    for layer in RESIDENT:
        for field in dataclasses.fields(stats[layer]):
            np.testing.assert_allclose(
                getattr(found_stats[layer], field.name),
                getattr(stats[layer], field.name),
                rtol=1e-4, atol=1e-3, err_msg=field.name,
            )  # fmt: skip


def test_other_experts_need_no_other_program(exported, setting):
    prompts, rows, adapter = setting
    other = {0: (1, 2, 0), 1: (3, 0)}
    batch, losses = prompts.assemble(rows[:3], None), []
    for name in ("torch", "executorch"):
        session = load_backend(name).open_train(exported, other)
        session.load(adapter)
        losses.append(session.forward_backward(batch)[0])
        session.close()
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_truncated_program_is_refused(exported, tmp_path):
    blob = exported.manifest.train.blob
    for b in (*slots.blobs_of(exported.base, RESIDENT), exported.base.dense):
        (tmp_path / b.sha256).symlink_to(exported.path(b))
    (tmp_path / blob.sha256).write_bytes(exported.path(blob).read_bytes()[:5000])
    broken = dataclasses.replace(exported, blobs=tmp_path)
    with pytest.raises(SessionError, match=f"program {blob.sha256[:12]}"):
        load_backend("executorch").open_train(broken, RESIDENT)

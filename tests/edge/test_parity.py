"""ExecuTorch against torch, slots of mixed format and rank: loss, statistics, the adapter after 20 steps."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge import slots
from edge.adamw import AdamW
from edge.data import Row, prompter, training_batches
from edge.session import SessionError, load_backend
from protocol import lora
from protocol.messages import Task

ROOT = Path(__file__).parents[2]
RESIDENT = {0: (3, 0, 2, 5), 1: (1, 4, 2)}
TASK = Task(labels=("sport", "science", "finance"))


@pytest.fixture(scope="module")
def setting(lowered, tokenizer):
    """(prompter, rows, adapter with small random values)."""
    shape = lowered.manifest.shape
    prompts = prompter(tokenizer, TASK, shape.batch, shape.sequence, shape.answers)
    words = "the bank team galaxy rate goal spectrum market captain".split()
    rng = np.random.default_rng(3)
    rows = [Row(" ".join(rng.choice(words, 4)), TASK.labels[i % 3]) for i in range(30)]
    adapter = {}
    for name, size in slots.adapter_shapes(lowered.base, shape, RESIDENT).items():
        fresh = name.endswith("lora_A")
        adapter[name] = lora.fresh_a(name, *size) if fresh else rng.normal(0, 0.02, size)
    return prompts, rows, {n: v.astype(np.float32) for n, v in adapter.items()}


def trained(backend, artifact, setting, steps):
    prompts, rows, adapter = setting
    session = backend.open_train(artifact, RESIDENT)
    session.load(adapter)
    parameters = session.parameters()
    trainable = slots.names_of(RESIDENT, parameters)
    optimizer = AdamW({n: 3e-4 if ".router." in n else 3e-3 for n in trainable})
    losses, routed = [], []
    for batch in training_batches(prompts, rows, steps, np.random.default_rng(0)):
        loss, counts = session.forward_backward(batch)
        optimizer.step(parameters, session.gradients())
        losses.append(loss)
        routed.append(counts)
    result = {n: v.copy() for n, v in parameters.items()}
    session.close()
    return losses, routed, result


def test_executorch_trains_as_torch_does(lowered, setting):
    reference, runtime = load_backend("torch"), load_backend("executorch")
    assert (reference.name, runtime.name) == ("torch", "executorch")
    losses, routed, wanted = trained(reference, lowered, setting, 20)
    found_losses, found_routed, found = trained(runtime, lowered, setting, 20)
    np.testing.assert_allclose(found_losses, losses, atol=1e-4)
    assert losses[-1] < losses[0]
    for one, other in zip(routed, found_routed, strict=True):
        for layer in RESIDENT:
            np.testing.assert_array_equal(one[layer], other[layer])
    assert wanted.keys() == found.keys()
    moved = set(slots.names_of(RESIDENT, wanted))  # output scales are not trained here
    for name, value in wanted.items():
        assert (value != setting[2].get(name, 1)).any() == (name in moved)
        np.testing.assert_allclose(found[name], value, atol=1e-3, err_msg=name)


def test_routed_torch_trains_as_torch_does(lowered, setting):
    losses, routed, wanted = trained(load_backend("torch"), lowered, setting, 20)
    found_losses, found_routed, found = trained(load_backend("torch-routed"), lowered, setting, 20)
    np.testing.assert_allclose(found_losses, losses, atol=1e-4)
    for one, other in zip(routed, found_routed, strict=True):
        for layer in RESIDENT:
            np.testing.assert_array_equal(one[layer], other[layer])
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-3, err_msg=name)


def test_executorch_really_ran(lowered, setting, monkeypatch):
    """Autograd is never used."""
    import torch

    def refuse(*_, **__):
        raise AssertionError("autograd was used")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    losses, _, _ = trained(load_backend("executorch"), lowered, setting, 2)
    assert np.isfinite(losses).all()
    with pytest.raises(AssertionError, match="autograd"):
        trained(load_backend("torch"), lowered, setting, 1)


TRAIN = """
import pickle, sys
from edge.session import load_backend
artifact, resident, adapter, batch = pickle.load(sys.stdin.buffer)
session = load_backend("executorch").open_train(artifact, resident)
session.load(adapter)
loss, _ = session.forward_backward(batch)
assert loss > 0 and len(session.gradients()) == len(adapter) + len(resident)
session.close()
mapped = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if ".so" in line}
print(sorted({"torch", "executorch", "transformers"} & set(sys.modules)))
print(sorted(name for name in mapped if "torch" in name and not name.startswith("libexecutorch")))
"""


def test_executorch_trains_in_a_process_without_torch(lowered, setting):
    """Neither the Python packages nor torch's libraries: a device needs the wheel's runtime only."""
    prompts, rows, adapter = setting
    given = pickle.dumps((lowered, RESIDENT, adapter, prompts.assemble(rows[:3], None)))
    done = subprocess.run([sys.executable, "-c", TRAIN], cwd=ROOT, input=given, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "[]\n[]\n"


def test_executorch_measures_as_torch_does(lowered, setting):
    prompts, rows, adapter = setting
    batch = prompts.assemble(rows[:3], None)
    results = []
    for name in ("torch", "executorch"):
        session = load_backend(name).open_evaluate(lowered, RESIDENT)
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


def test_other_experts_need_no_other_program(lowered, setting):
    prompts, rows, adapter = setting
    other = {0: (1, 2, 0, 4), 1: (3, 0, 5)}
    names = slots.adapter_shapes(lowered.base, lowered.manifest.shape, other)
    adapter = dict(zip(names, adapter.values(), strict=True))  # same slots, same shapes
    batch, losses = prompts.assemble(rows[:3], None), []
    for name in ("torch", "executorch"):
        session = load_backend(name).open_train(lowered, other)
        session.load(adapter)
        losses.append(session.forward_backward(batch)[0])
        session.close()
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def blobs_without(lowered, missing, folder):
    """The artifact with the blobs of RESIDENT in `folder`, less one."""
    manifest = lowered.manifest
    wanted = slots.blobs_of(lowered.base, manifest.shape, RESIDENT)
    for blob in {*wanted, manifest.dense, manifest.train.blob} - {missing}:
        (folder / blob.sha256).symlink_to(lowered.path(blob))
    return dataclasses.replace(lowered, blobs=folder)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_program_is_refused(lowered, tmp_path, part):
    blob = lowered.manifest.train.blob
    broken = blobs_without(lowered, blob, tmp_path)
    (tmp_path / blob.sha256).write_bytes(lowered.path(blob).read_bytes()[: int(part * blob.bytes)])
    with pytest.raises(SessionError, match=f"{blob.sha256}: the runtime refuses the program"):
        load_backend("executorch").open_train(broken, RESIDENT)


@pytest.mark.parametrize("size", [None, 0, 5000])
def test_a_truncated_dense_blob_is_refused(lowered, tmp_path, size):
    blob = lowered.manifest.dense
    broken = blobs_without(lowered, blob, tmp_path)
    if size is not None:
        (tmp_path / blob.sha256).write_bytes(lowered.path(blob).read_bytes()[:size])
    with pytest.raises(SessionError, match=blob.sha256) as refused:
        load_backend("executorch").open_train(broken, RESIDENT)
    assert "\n" not in str(refused.value)


def test_an_input_of_another_shape_is_named(lowered, setting):
    prompts, rows, adapter = setting
    session = load_backend("executorch").open_train(lowered, RESIDENT)
    session.load(adapter)
    batch = prompts.assemble(rows[:3], None)
    short = dataclasses.replace(batch, tokens=batch.tokens[:, :-1])
    with pytest.raises(SessionError, match=r"tokens: int64 \(4, 31\), int64 \(4, 32\) wanted"):
        session.forward_backward(short)
    strange = dataclasses.replace(batch, tokens=batch.tokens + 100_000)
    with pytest.raises(SessionError, match="token 100"):
        session.forward_backward(strange)
    assert np.isfinite(session.forward_backward(batch)[0])
    session.close()

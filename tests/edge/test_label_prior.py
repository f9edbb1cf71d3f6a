"""The label prior: what a device adds to its labels' logits, and what that does to its answers and its gradients."""

import numpy as np
import pytest
import torch

from edge import objective_torch, trainer
from edge.data import Row, by_label, prompter
from edge.session import PLAIN, Terms, load_backend
from edge.statistics import Score
from export import local_objective
from protocol.messages import Task
from protocol.objective import Objective
from tests.edge.test_session_torch import RESIDENT, adapter_of

TASK = Task(labels=("sport", "science"))


@pytest.fixture
def prompts(tokenizer):
    return prompter(tokenizer, TASK, 4, 32, 3)


def rows(sport, science):
    return [Row(f"a goal {i}", "sport") for i in range(sport)] + [
        Row(f"the galaxy {i}", "science") for i in range(science)
    ]


def test_the_bias_by_hand(prompts):
    """Three to one, each half a row more: shares 0.7 and 0.3; half their logarithms."""
    bias = trainer.label_bias(prompts, rows(3, 1), 0.5, 400)
    assert (bias.shape, bias.dtype) == ((400,), np.float32)
    found = bias[prompts.verbaliser.first]
    np.testing.assert_allclose(found, [0.5 * np.log(3.5 / 5), 0.5 * np.log(1.5 / 5)], rtol=1e-6)
    assert np.count_nonzero(bias) == 2


def test_without_labels_or_tau_there_is_none(prompts, tokenizer):
    free = prompter(tokenizer, Task(answer="text"), 4, 32, 3)
    assert trainer.label_bias(free, rows(1, 0), 0.5, 400) is None
    assert trainer.label_bias(prompts, rows(1, 0), 0.0, 400) is None


@pytest.mark.parametrize(("counts", "right"), [((3, 1), 0.75), ((1, 3), 0.75), ((0, 4), 1.0)])
def test_who_knows_nothing_answers_with_the_most_common_label(prompts, counts, right):
    here = rows(*counts)
    bias = trainer.label_bias(prompts, here, 0.5, 400)
    score = Score(bias)
    for batch in by_label(prompts, here):
        # A slight wish for science: the prior has to turn it round where sport is more common.
        logits = np.zeros((*batch.targets.shape, 400), np.float32)
        logits[..., prompts.verbaliser.first[1]] = 0.1
        score.add(logits, batch, prompts.verbaliser.first)
    assert score.accuracy == right


def gradient_of(logits, bias, target, *, exported):
    """Of the loss, [N, V]; every row has one answer token."""
    logits = logits.clone().requires_grad_(True)
    weights = torch.ones(len(logits))
    if exported:
        moved = local_objective.with_bias(logits, torch.from_numpy(bias), 1)
        targets = torch.full((len(logits), 1), target)
        _, loss = local_objective.answer_losses(moved, targets, weights[:, None], torch.zeros(1))
    else:
        moved = objective_torch.with_bias(logits, Terms(logit_bias=bias), 1)
        _, loss = objective_torch.answer_losses(
            moved, torch.full((len(logits),), target), weights, 0.0
        )
    loss.backward()
    return logits.grad.numpy()


@pytest.mark.parametrize("exported", [False, True])
def test_a_device_with_one_label_teaches_nothing_about_it(prompts, exported):
    """A model that knows the labels but not which: without the prior it would learn to say sport, whatever it reads."""
    first = prompts.verbaliser.first
    logits = torch.full((4, 400), -20.0)
    logits[:, first] = 5.0
    nothing = np.zeros(400, np.float32)
    plain = gradient_of(logits, nothing, int(first[0]), exported=exported)[:, first]
    np.testing.assert_allclose(plain, [[-0.125, 0.125]] * 4, atol=1e-6)  # 4 rows, each half wrong
    bias = trainer.label_bias(prompts, rows(100, 0), 1.0, 400)
    adjusted = gradient_of(logits, bias, int(first[0]), exported=exported)[:, first]
    # p(sport) is its share, 100.5 / 101.
    np.testing.assert_allclose(adjusted, [[-0.125 / 101, 0.125 / 101]] * 4, rtol=1e-3)


def test_only_first_answer_tokens_have_it():
    bias = np.array([1.0, -1.0], np.float32)
    logits = torch.arange(8.0).reshape(4, 2)  # two rows with two answer tokens each
    wanted = logits + torch.tensor([[1.0, -1], [0, 0], [1, -1], [0, 0]])
    torch.testing.assert_close(objective_torch.with_bias(logits, Terms(logit_bias=bias), 2), wanted)
    torch.testing.assert_close(local_objective.with_bias(logits, torch.from_numpy(bias), 2), wanted)
    assert objective_torch.with_bias(logits, PLAIN, 2) is logits


def test_both_torch_sessions_train_with_it(artifact, tokenizer):
    shape = artifact.manifest.shape
    prompts = prompter(tokenizer, TASK, shape.batch, shape.sequence, shape.answers)
    batch = prompts.assemble(rows(2, 1), None)
    bias = trainer.label_bias(prompts, rows(9, 1), 1.0, artifact.base.vocabulary)
    adapter, found = adapter_of(artifact, np.random.default_rng(1)), {}
    for name in ("torch", "torch-routed"):
        session = load_backend(name).open_train(artifact, RESIDENT)
        session.load(adapter)
        for terms in (PLAIN, Terms(logit_bias=bias)):
            loss, _ = session.forward_backward(batch, terms)
            kept = {n: v.copy() for n, v in session.gradients().items()}
            found.setdefault(name, []).append((loss, kept))
        session.close()
    for one, other in zip(found["torch"], found["torch-routed"], strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5)
        for name, gradient in one[1].items():
            np.testing.assert_allclose(other[1][name], gradient, atol=1e-5, err_msg=name)
    (plain, before), (moved, after) = found["torch"]
    assert moved != pytest.approx(plain, abs=1e-3)
    assert max(np.abs(after[n] - v).max() for n, v in before.items()) > 1e-4


def test_a_lease_with_a_label_prior(artifact, tokenizer, monkeypatch):
    """The bias is in every step, and in what is measured before and after."""
    shape = artifact.manifest.shape
    prompts = prompter(tokenizer, TASK, shape.batch, shape.sequence, shape.answers)
    backend, seen = load_backend("torch"), []
    opened = backend.open_train

    def open_train(*given):
        session = opened(*given)
        step = session.forward_backward
        session.forward_backward = lambda batch, terms: (
            seen.append(terms.logit_bias),
            step(batch, terms),
        )[1]
        return session

    monkeypatch.setattr(backend, "open_train", open_train)
    adapter, results = adapter_of(artifact, np.random.default_rng(1)), []
    for tau in (0.0, 50.0):
        job = trainer.Job(
            work="train", resident=RESIDENT, trained=RESIDENT, steps=2, learning_rate=0.0,
            router_learning_rate=0.0, seed=0, objective=Objective(label_prior=tau),
        )  # fmt: skip
        held_back = [Row("the rate", "sport")] * 5
        results.append(
            trainer.work(
                backend, artifact, adapter, job, prompts, rows(9, 1), held_back, lambda: None
            )
        )
    assert seen[:2] == [None, None]
    wanted = trainer.label_bias(prompts, rows(9, 1), 50.0, artifact.base.vocabulary)
    assert all(np.array_equal(bias, wanted) for bias in seen[2:])
    assert len(seen) == 4
    # So strong a prior answers sport whatever the model says.
    assert results[1].before[1] == results[1].after[1] == 1
    assert results[0].before[0] != results[1].before[0]

"""What the scoreboard measures: greedy answers, the loss of plain text, accuracy, and the oracle's sign."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.federated import measure, profiles
from edge import trainer
from edge.data import Row, by_label, first_by_hash, prompter
from edge.routed_torch import RoutedBackend, RoutedSession
from protocol.messages import Task
from tests.benchmarks import tiny_world

TEXTS = (
    "the bank raised",
    "a",
    "the team won the match after a late goal by the captain",
    "galaxy",
)


@pytest.fixture(scope="module")
def base(artifact, tokenizer):
    return tiny_world.base_of(artifact, tokenizer)


@pytest.fixture(scope="module")
def world(base):
    return tiny_world.world_of(base, {name: tiny_world.rows(i) for i, name in enumerate("ab")})


@pytest.fixture
def session(world):
    """All experts of the tiny base, with random factors."""
    index = world.base.index
    everyone = {layer: tuple(range(index.num_experts)) for layer in index.moe_layers}
    shape = world.shape([index.num_experts] * len(index.moe_layers), 4)
    opened = RoutedBackend().open_evaluate(world.base.artifact(shape), everyone)
    rng = np.random.default_rng(0)
    values = {n: rng.normal(0, 0.1, v.shape) for n, v in opened.parameters().items()}
    opened.load({n: np.float32(v) for n, v in values.items() if "scale" not in n})
    return opened


def generated(session, prompts, text):
    """What transformers' own loop says, one prompt at a time, without padding."""
    session.free_run()
    ids = prompts.tokenizer.encode(text, add_special_tokens=False).ids
    room = prompts.sequence - prompts.answers
    given = torch.tensor([ids[-room:]])
    with torch.no_grad():
        out = session.body.model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False,
            max_new_tokens=prompts.answers, min_new_tokens=prompts.answers,
        )  # fmt: skip
    return out[0, given.shape[1] :].tolist()


def test_greedy_says_what_transformers_generate_says(session, tokenizer):
    prompts = prompter(tokenizer, Task(template="{text}", answer="text"), 4, 20, 6)
    rows = [Row(text, "x") for text in TEXTS]
    wanted = [generated(session, prompts, text) for text in TEXTS]
    assert len({tuple(ids) for ids in wanted}) > 1
    found = measure.greedy(session, prompts, rows)
    assert found == [tokenizer.decode(ids) for ids in wanted]
    # An end token cuts the answer.
    end = wanted[0][2]
    ended = measure.greedy(session, dataclasses.replace(prompts, end=end), rows)
    for ids, answer in zip(wanted, ended, strict=True):
        kept = ids[: ids.index(end)] if end in ids else ids
        assert answer == tokenizer.decode(kept)
    assert ended[0] != found[0]


def test_text_loss_by_hand(session):
    windows = np.random.default_rng(1).integers(0, 300, (19, 10))  # more than one batch
    session.free_run()
    tokens = torch.from_numpy(windows)
    with torch.no_grad():
        logits = session.body.model(tokens).logits
    wanted = F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )
    assert measure.text_loss(session, windows) == pytest.approx(wanted.item(), rel=1e-5)


def test_accuracy_and_loss_are_those_of_the_device(session, world):
    """The same numbers as a device finds by `edge.trainer.evaluate`."""
    task, prompts = world.tasks["topics"], world.prompts
    rows = list(task.validation)
    found = measure.measure(session, prompts, task, rows)
    first = prompts.verbaliser.first
    score = trainer.evaluate(
        session, session.parameters(), by_label(prompts, rows), first, lambda: None
    )
    assert found.rows == len(rows)
    assert found.scores["accuracy"] == pytest.approx(score.accuracy)
    assert found.scores["answer_loss"] == pytest.approx(score.loss, rel=1e-5)
    assert found.right.mean() == pytest.approx(score.accuracy)


def test_a_bias_for_a_label_makes_it_the_answer(session, world):
    """A prior moves labels against each other, so that all of them have one, as `edge.trainer.label_bias` gives."""
    task, prompts = world.tasks["topics"], world.prompts
    bias = np.zeros(prompts.tokenizer.get_vocab_size(), np.float32)
    bias[prompts.verbaliser.first] = -1e3
    bias[prompts.verbaliser.first[1]] = -1e-3
    found = measure.measure(session, prompts, task, list(task.validation), bias=bias)
    wanted = [row.label == task.labels[1] for row in task.validation]
    assert found.right.tolist() == wanted


def test_the_oracle_values_what_is_missed(world, tmp_path):
    """By sub-MoEs that really lack the expert: the loss without it less the loss with it, 0 where that helps."""
    index, backend = world.base.index, RoutedBackend()
    found = profiles.oracle(world, backend, tmp_path)
    layers, experts = len(index.moe_layers), index.num_experts
    for client in world.clients:
        rows = first_by_hash(world.rows(client, "train"), profiles.ORACLE_ROWS)

        def loss(position=None, expert=None, rows=rows):
            held = {
                layer: tuple(e for e in range(experts) if (i, e) != (position, expert))
                for i, layer in enumerate(index.moe_layers)
            }
            artifact = world.base.artifact(world.shape([len(ids) for ids in held.values()], 4))
            body = backend.body(artifact)
            opened = RoutedSession(body, held, artifact.manifest.shape)
            prompts = world.prompts
            values = opened.parameters()
            return trainer.evaluate(
                opened, values, by_label(prompts, rows), None, lambda: None
            ).loss

        full = loss()
        grown = np.array([[loss(i, e) - full for e in range(experts)] for i in range(layers)])
        assert (grown > 1e-4).any()
        assert (grown < -1e-4).any()
        wanted = np.maximum(grown, 0)
        wanted /= wanted.sum(-1, keepdims=True)
        np.testing.assert_allclose(found[client.name], wanted, atol=1e-3)
    again = profiles.oracle(world, None, tmp_path)  # from its file
    assert all((again[name] == value).all() for name, value in found.items())

"""The fast torch backend against the torch reference: statistics, terms of the objective, padding, closed slots."""

import dataclasses

import numpy as np
import pytest
import torch

from edge import session
from edge.data import Row, prompter
from edge.routed_torch import RoutedSession, open_body
from edge.session import PLAIN, SessionError, Terms
from tests.edge.test_session_torch import RESIDENT, TASK, adapter_of

EXTENSIVE = ("mass", "top", "g_log_g", "missed", "output_norm")


@pytest.fixture(scope="module")
def prompts(artifact, tokenizer):
    s = artifact.manifest.shape
    return prompter(tokenizer, TASK, s.batch, s.sequence, s.answers)


@pytest.fixture(scope="module")
def batch(prompts):
    """Two rows of four, both shorter than 32 tokens."""
    rows = [Row("a goal for the team", "sport"), Row("the galaxy", "science")]
    return prompts.assemble(rows, None)


@pytest.fixture(scope="module")
def adapter(artifact):
    return adapter_of(artifact, np.random.default_rng(1))


@pytest.fixture(scope="module")
def sessions(artifact):
    """(reference, fast), both open: they share nothing."""
    opened = [
        session.load_backend(name).open_train(artifact, RESIDENT)
        for name in ("torch", "torch-routed")
    ]
    yield opened
    for each in opened:
        each.close()


def step(opened, batch, terms, adapter):
    opened.load(adapter)
    loss, routed = opened.forward_backward(batch, terms)
    return loss, routed, {n: v.copy() for n, v in opened.gradients().items()}, opened.taylor()


def same_stats(found, wanted, fields):
    for layer in wanted:
        for name in fields:
            np.testing.assert_allclose(
                getattr(found[layer], name), getattr(wanted[layer], name),
                rtol=1e-4, atol=1e-5, err_msg=f"{name} of layer {layer}",
            )  # fmt: skip


def test_statistics_and_logits_are_the_references(artifact, batch, adapter):
    results = []
    for name in ("torch", "torch-routed"):
        opened = session.load_backend(name).open_evaluate(artifact, RESIDENT)
        results.append(opened.evaluate(batch, adapter))
        opened.close()
    (logits, wanted), (found_logits, found) = results
    there = batch.weights > 0
    np.testing.assert_allclose(found_logits[there], logits[there], atol=1e-4)
    same_stats(found, wanted, [f.name for f in dataclasses.fields(wanted[0])])
    assert all((wanted[layer].output_norm > 0).any() for layer in RESIDENT)


BIAS = np.linspace(-1, 1, 320).astype(np.float32)
TARGETS = {0: np.array([0.1, 0.2, 0.3, 0.4], np.float32)}
TERMS = {
    "plain": PLAIN,
    "label_smoothing": Terms(label_smoothing=0.3),
    "balance": Terms(balance=0.5),
    "target_balance": Terms(target_balance=0.5, targets=TARGETS),
    "z_loss": Terms(z_loss=0.1),
    "cap": Terms(cap=2),
    "cap of 3": Terms(cap=3),
    "backward cap": Terms(cap=2, cap_where="backward"),
    "active": Terms(active=1),
    "logit_bias": Terms(logit_bias=BIAS),
    "all": Terms(
        label_smoothing=0.1, balance=0.3, target_balance=0.2, z_loss=0.05, cap=3, active=1,
        targets=TARGETS, logit_bias=BIAS,
    ),
}  # fmt: skip


def with_size(terms, tokenizer):
    """A bias for a vocabulary of this size."""
    if terms.logit_bias is None:
        return terms
    size = tokenizer.get_vocab_size()
    return dataclasses.replace(terms, logit_bias=np.resize(terms.logit_bias, size))


@pytest.mark.parametrize("name", TERMS)
def test_every_term_gives_the_gradients_of_the_reference(sessions, batch, adapter, name, tokenizer):
    terms = with_size(TERMS[name], tokenizer)
    wanted, found = (step(opened, batch, terms, adapter) for opened in sessions)
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    assert found[2].keys() == wanted[2].keys()
    for n, gradient in wanted[2].items():
        np.testing.assert_allclose(found[2][n], gradient, rtol=1e-3, atol=2e-5, err_msg=n)
    for layer in RESIDENT:
        np.testing.assert_array_equal(found[1][layer], wanted[1][layer])
        np.testing.assert_allclose(found[3][layer], wanted[3][layer], rtol=1e-3, atol=1e-5)
    if name != "plain":
        plain = step(sessions[1], batch, PLAIN, adapter)
        change = max(np.abs(found[2][n] - v).max() for n, v in plain[2].items())
        assert change > 1e-3


def widened(batch, rows, width):
    """The same rows with more padding to their right and below."""
    b, s = batch.tokens.shape

    def grown(array, shape):
        out = np.zeros(shape, array.dtype)
        out[tuple(slice(n) for n in array.shape)] = array
        return out

    k = batch.positions.shape[1]
    row, column = batch.positions // s, batch.positions % s
    labels = np.full(rows, -1, np.int64)
    labels[:b] = batch.labels
    return dataclasses.replace(
        batch,
        tokens=grown(batch.tokens, (rows, width)),
        valid=grown(batch.valid, (rows, width)),
        positions=grown(np.where(batch.weights > 0, row * width + column, 0), (rows, k)),
        targets=grown(batch.targets, (rows, k)),
        weights=grown(batch.weights, (rows, k)),
        labels=labels,
    )


@pytest.mark.parametrize("terms", [PLAIN, TERMS["all"]], ids=["plain", "all"])
def test_padding_changes_nothing(sessions, batch, adapter, terms):
    terms = dataclasses.replace(terms, logit_bias=None)
    _, fast = sessions
    wide = widened(batch, 7, 50)
    loss, routed, gradients, taylor = step(fast, batch, terms, adapter)
    found = step(fast, wide, terms, adapter)
    assert found[0] == pytest.approx(loss, abs=1e-6)
    for n, gradient in gradients.items():
        np.testing.assert_allclose(found[2][n], gradient, rtol=1e-4, atol=1e-6, err_msg=n)
    for layer in RESIDENT:
        np.testing.assert_array_equal(found[1][layer], routed[layer])
        np.testing.assert_allclose(found[3][layer], taylor[layer], rtol=1e-4, atol=1e-6)
    logits, wanted = fast.evaluate(batch, adapter)
    wide_logits, stats = fast.evaluate(wide, adapter)
    there = batch.weights > 0
    np.testing.assert_allclose(wide_logits[: len(there)][there], logits[there], atol=1e-5)
    same_stats(stats, wanted, (*EXTENSIVE, "peak"))


def test_what_stands_in_padding_changes_nothing(sessions, batch, adapter):
    """Also where it is not cut off: the shorter row's padding."""
    _, fast = sessions
    noise = np.random.default_rng(0).integers(0, 300, batch.tokens.shape)
    noisy = dataclasses.replace(batch, tokens=np.where(batch.valid > 0, batch.tokens, noise))
    assert (noisy.tokens[:2, : int(batch.valid.sum(1).max())] != 0).all()
    loss, routed, gradients, _ = step(fast, batch, TERMS["balance"], adapter)
    found = step(fast, noisy, TERMS["balance"], adapter)
    assert found[0] == pytest.approx(loss, abs=1e-6)
    for n, gradient in gradients.items():
        np.testing.assert_allclose(found[2][n], gradient, rtol=1e-4, atol=1e-6, err_msg=n)
    for layer in RESIDENT:
        np.testing.assert_array_equal(found[1][layer], routed[layer])


def test_a_closed_slot_gets_no_token_as_if_it_were_not_there(artifact, batch, adapter):
    body, shape = open_body(artifact), artifact.manifest.shape
    whole = RoutedSession(body, RESIDENT, shape)
    whole.load(adapter)
    plain = whole.logits(batch).numpy()
    body.blocks[0].closed = 1
    closed = whole.logits(batch).numpy()
    _, routed = whole.forward_backward(batch)
    assert routed[0][1] == 0
    assert routed[0].sum() == batch.valid.sum() * artifact.base.top_k
    body.blocks[0].closed = None
    np.testing.assert_array_equal(whole.logits(batch).numpy(), plain)
    less = dataclasses.replace(
        shape, slots=((*shape.slots[0][:1], *shape.slots[0][2:]), shape.slots[1])
    )
    without = RoutedSession(body, {**RESIDENT, 0: (*RESIDENT[0][:1], *RESIDENT[0][2:])}, less)
    without.load(adapter)
    there = batch.weights.reshape(-1) > 0
    np.testing.assert_allclose(closed[there], without.logits(batch).numpy()[there], atol=1e-5)
    assert np.abs(closed[there] - plain[there]).max() > 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", TERMS)
def test_an_accelerator_agrees_with_the_cpu(artifact, batch, adapter, name, tokenizer):
    """Also after the host changed the parameters, as the optimiser does."""
    terms = with_size(TERMS[name], tokenizer)
    here, there = (
        RoutedSession(open_body(artifact, device), RESIDENT, artifact.manifest.shape)
        for device in ("cpu", "cuda")
    )
    for scale in (1.0, 0.5):
        moved = {n: (scale * value).astype(np.float32) for n, value in adapter.items()}
        loss, routed, gradients, _ = step(here, batch, terms, moved)
        found = step(there, batch, terms, moved)
        assert found[0] == pytest.approx(loss, abs=1e-4)
        for n, gradient in gradients.items():
            np.testing.assert_allclose(found[2][n], gradient, rtol=1e-2, atol=1e-4, err_msg=n)
        for layer in RESIDENT:
            np.testing.assert_array_equal(found[1][layer], routed[layer])
        np.testing.assert_allclose(there.logits(batch), here.logits(batch), atol=1e-3)


def test_another_family_is_refused_in_one_line(artifact):
    other = dataclasses.replace(
        artifact, base=dataclasses.replace(artifact.base, model_type="gpt_oss")
    )
    with pytest.raises(SessionError) as refused:
        session.load_backend("torch-routed").open_train(other, RESIDENT)
    assert str(refused.value) == (
        "backend torch-routed: gpt_oss found, one of mixtral, olmoe, qwen3_moe wanted"
    )


def test_sessions_of_one_backend_share_the_dense_part(artifact, batch, adapter):
    """Another selection, then the first again: nothing of either stays in the other."""
    backend = session.load_backend("torch-routed")
    first = backend.open_evaluate(artifact, RESIDENT)
    logits, _ = first.evaluate(batch, adapter)
    body = first.body
    other = {0: (1, 4, 0, 2), 1: (0, 5, 3)}
    again = backend.open_train(artifact, other)
    assert again.body is body
    with pytest.raises(KeyError, match="layers"):
        again.load(adapter)
    back, _ = backend.open_evaluate(artifact, RESIDENT).evaluate(batch, adapter)
    np.testing.assert_array_equal(back, logits)
    assert torch.is_grad_enabled()

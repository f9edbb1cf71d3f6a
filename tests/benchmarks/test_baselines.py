"""Adapter experts and the linear probe: gradients by differences, and their names through aggregation."""

import numpy as np
import pytest
import torch

from benchmarks.federated import baselines
from edge.data import Row, prompter
from edge.session import PLAIN, Terms
from protocol import names
from server.aggregate import aggregate
from server.contribution import from_stats
from server.presets import FEDAVG
from tests.benchmarks import tiny_world

RESIDENT = {0: (5, 0, 3, 2), 1: (4, 1, 2)}
KINDS = ("adapters", "probe")


@pytest.fixture(scope="module")
def batch(artifact, tokenizer):
    s = artifact.manifest.shape
    rows = [Row("a goal for the team", "sport"), Row("the galaxy", "science")]
    return prompter(tokenizer, tiny_world.TASK, s.batch, s.sequence, s.answers).assemble(rows, None)


def opened(kind, artifact):
    backend = baselines.BaselineBackend(kind)
    backend.frozen = RESIDENT
    return backend.open_train(artifact, {})


def random_values(kind, base, seed=1):
    rng = np.random.default_rng(seed)
    fresh = baselines.fresh(kind, base)
    return {n: rng.normal(0, 0.1, v.shape).astype(np.float32) for n, v in fresh.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_trained_changes_nothing(artifact, batch, kind):
    """Fresh values leave the frozen sub-MoE as it is; random ones do not."""
    from edge.session import load_backend

    plain = load_backend("torch-routed").open_evaluate(artifact, RESIDENT)
    wanted = plain.logits(batch).numpy()
    session = opened(kind, artifact)
    session.load(baselines.fresh(kind, artifact.base))
    np.testing.assert_allclose(session.logits(batch).numpy(), wanted, atol=1e-6)
    session.load(random_values(kind, artifact.base))
    assert np.abs(session.logits(batch).numpy() - wanted).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        ("probe", PLAIN),
        ("adapters", PLAIN),
        ("adapters", Terms(target_balance=0.3, z_loss=0.1)),
        ("adapters", Terms(target_balance=0.3, active=1)),
    ],
)
def test_gradients_are_those_of_the_objective(artifact, batch, kind, terms, monkeypatch):
    session = opened(kind, artifact)
    session.load(random_values(kind, artifact.base))
    loss, _ = session.forward_backward(batch, terms)
    gradients = {n: v.copy() for n, v in session.gradients().items()}
    parameters, values = session.parameters(), []
    assert gradients.keys() == baselines.fresh(kind, artifact.base).keys()
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: values.append(self.item()))
    steep = 0
    for name, gradient in gradients.items():
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        before = parameters[name][place]
        for sign in (1, -1):
            parameters[name][place] = before + sign * 1e-3
            session.forward_backward(batch, terms)
        parameters[name][place] = before
        slope = (values[-2] - values[-1]) / 2e-3
        assert slope == pytest.approx(gradient[place], rel=0.05, abs=2e-3), name
        steep += abs(gradient[place]) > 1e-2
    assert steep > (2 if kind == "adapters" else 1)
    if terms is PLAIN:
        assert values[-1] == pytest.approx(loss, abs=0.05)


def test_adapter_experts_by_hand(artifact, batch):
    """One layer's adapter experts as plain torch over the same hidden states."""
    import torch.nn.functional as F

    session = opened("adapters", artifact)
    session.load(random_values("adapters", artifact.base))
    beside = baselines.besides(session.body)[0]
    seen = {}
    beside.register_forward_hook(lambda module, given, out: seen.update(x=given[0], y=out))
    beside.block.register_forward_hook(lambda module, given, out: seen.update(frozen=out))
    _, routed = session.forward_backward(batch)
    x = seen["x"].detach().reshape(-1, artifact.base.hidden)
    down, up, moved = (t.detach() for t in beside.trained)
    p = (x @ (beside.gate + moved).t()).softmax(-1)
    wanted, counts = torch.zeros_like(x), np.zeros(baselines.ADAPTERS)
    for t in range(len(x)):
        best = torch.argsort(-p[t])[: baselines.ADAPTER_TOP_K]
        for m in best:
            share = p[t, m] / p[t, best].sum()
            wanted[t] += share * up[m] @ F.silu(down[m] @ x[t])
    found = (seen["y"] - seen["frozen"]).detach().reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    width = int(batch.valid.sum(1).max())
    valid = batch.valid[:2, :width].reshape(-1)
    for t in np.flatnonzero(valid):
        counts[torch.argsort(-p[t])[: baselines.ADAPTER_TOP_K]] += 1
    np.testing.assert_array_equal(routed[0], counts)


@pytest.mark.parametrize("kind", KINDS)
def test_their_names_are_averaged_one_factor_at_a_time(artifact, kind):
    base = artifact.base
    before = baselines.fresh(kind, base)
    assert all(names.parse(name) is not None for name in before)
    trained = np.zeros((len(base.moe_layers), base.num_experts), np.float32)
    if kind == "adapters":
        trained[:, : baselines.ADAPTERS] = 5
    else:
        trained[0, 0] = 5
    stats = {"trained_tokens": trained, "mass": trained + 1}
    sent = {device: random_values(kind, base, seed) for seed, device in enumerate("ab")}
    contributions = [
        from_stats(d, v, stats, base.moe_layers, top_k=base.top_k, rows=rows)
        for (d, v), rows in zip(sent.items(), (30, 10), strict=True)
    ]
    after = aggregate(before, contributions, ("adapter",), FEDAVG).adapter
    assert after.keys() == before.keys()
    for name in before:
        mean = 0.75 * sent["a"][name] + 0.25 * sent["b"][name]
        np.testing.assert_allclose(after[name], mean, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_travels(artifact, kind):
    session = opened(kind, artifact)
    fresh = baselines.fresh(kind, artifact.base)
    assert {n: v.shape for n, v in session.parameters().items()} == {
        n: v.shape for n, v in fresh.items()
    }
    assert baselines.trained_floats(kind, artifact.base) == sum(v.size for v in fresh.values())

import numpy as np
import pytest
import torch

from edge.adamw import AdamW


def test_it_is_torch_adamw_with_clipping():
    rng = np.random.default_rng(0)
    ours = {
        "a": rng.normal(size=(3, 4)).astype(np.float32),
        "r": rng.normal(size=5).astype(np.float32),
    }
    theirs = {n: torch.nn.Parameter(torch.from_numpy(v.copy())) for n, v in ours.items()}
    optimizer = AdamW({"a": 1e-2, "r": 1e-3})
    reference = torch.optim.AdamW(
        [{"params": [theirs["a"]], "lr": 1e-2}, {"params": [theirs["r"]], "lr": 1e-3}],
        weight_decay=0.0,
    )
    for scale in (0.01, 5.0, 0.3, 100.0, 1e-4):
        gradients = {
            n: (rng.normal(size=v.shape) * scale).astype(np.float32) for n, v in ours.items()
        }
        for n, p in theirs.items():
            p.grad = torch.from_numpy(gradients[n].copy())
        wanted = torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
        reference.step()
        assert optimizer.step(ours, gradients) == pytest.approx(float(wanted), rel=1e-5)
    for n, v in ours.items():
        np.testing.assert_allclose(v, theirs[n].detach().numpy(), atol=1e-6)


def test_the_first_step_by_hand():
    p = {"a": np.array([1.0, 2.0], np.float32)}
    AdamW({"a": 0.1}).step(p, {"a": np.array([0.3, -0.2], np.float32)})
    np.testing.assert_allclose(p["a"], [0.9, 2.1], atol=1e-6)


def test_it_writes_through_views_and_leaves_zero_gradients_alone():
    store = np.arange(12, dtype=np.float32).reshape(3, 4)
    gradient = np.zeros((4, 3), np.float32)
    gradient[0] = 1
    AdamW({"a": 0.1}).step({"a": store.T}, {"a": gradient})
    assert store[:, 1:].tolist() == np.arange(12, dtype=np.float32).reshape(3, 4)[:, 1:].tolist()
    np.testing.assert_allclose(store[:, 0], [-0.1, 3.9, 7.9], atol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing():
    p = {"a": np.ones(2, np.float32)}
    norm = AdamW({"a": 0.1}).step(p, {"a": np.array([np.nan, 1], np.float32)})
    assert np.isnan(norm)
    assert p["a"].tolist() == [1, 1]

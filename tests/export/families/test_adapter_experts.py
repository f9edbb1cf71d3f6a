import pytest
import torch
import torch.nn.functional as F

from export.adapter_experts import adapter_experts, output_norms


def example(widths, tokens=5, hidden=8, top_k=2):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x = draw(tokens, hidden)
    slot = torch.stack([torch.randperm(len(widths), generator=generator)[:top_k] for _ in x])
    weight = torch.softmax(draw(tokens, top_k), -1)
    return x, weight, slot, [draw(h, hidden) for h in widths], [draw(hidden, h) for h in widths]


def one_by_one(x, weight, slot, v, u):
    """Token by token, expert by expert."""
    rows, norms = [], torch.zeros(slot.shape)
    for t, token in enumerate(x):
        row = torch.zeros_like(token)
        for j, p in enumerate(slot[t].tolist()):
            out = u[p] @ F.silu(v[p] @ token)
            norms[t, j] = out.norm()
            row = row + weight[t, j] * out
        rows.append(row)
    return torch.stack(rows), norms


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("widths", [(4, 4, 4), (6, 3, 1)])
def test_two_products_equal_one_expert_after_the_other(widths):
    x, weight, slot, v, u = example(widths)
    wanted, norms = one_by_one(x, weight, slot, v, u)
    torch.testing.assert_close(adapter_experts(x, weight, slot, flat(v), flat(u), widths), wanted)
    torch.testing.assert_close(output_norms(x, slot, flat(v), flat(u), widths), norms)


@pytest.mark.parametrize("widths", [(4, 4, 4), (6, 3, 1)])
def test_gradients_are_those_of_the_slow_way_and_zero_without_tokens(widths):
    x, weight, slot, v, u = example(widths)
    slot = slot % 2 if len(widths) == 3 else slot  # nobody goes to slot 2
    slot[:, 1] = 1 - slot[:, 0]
    leaves = [t.requires_grad_(True) for t in (x, weight, *v, *u)]
    target = torch.linspace(-1, 1, x.numel()).view(x.shape)
    slow = torch.autograd.grad(
        (one_by_one(x, weight, slot, v, u)[0] * target).sum(), leaves, allow_unused=True
    )
    fast = torch.autograd.grad(
        (adapter_experts(x, weight, slot, flat(v), flat(u), widths) * target).sum(), leaves
    )
    for wanted, got in zip(slow, fast, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)
    assert not fast[4].any()  # V of slot 2

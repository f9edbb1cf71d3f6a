"""Each rewrite on a graph small enough to see."""

import pytest
import torch
from torch.export import export

from export import graph_passes


class Call(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def simplified(function, *arguments):
    """(names of what is called, the program's own outputs)."""
    program = export(Call(function), arguments, strict=False).run_decompositions()
    graph_passes.simplify(program)
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    return calls, program.graph_module(*arguments)


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (lambda x: x**2 + 1, ["aten.mul.Tensor", "aten.add.Tensor"]),
        (lambda x: x**1 + 1, ["aten.add.Tensor"]),
        (lambda x: x.transpose(0, 1).permute(1, 0) + 1, ["aten.add.Tensor"]),
        (lambda x: x.permute(1, 0).permute(1, 0) + 1, ["aten.add.Tensor"]),
        (lambda x: x.view(2, 3).detach() + 1, ["aten.add.Tensor"]),
        (lambda x: x.exp() + x.exp(), ["aten.exp.default", "aten.add.Tensor"]),
        (lambda x: x.transpose(0, 1) + 1, ["aten.permute.default", "aten.add.Tensor"]),
        (lambda x: x**3, ["aten.pow.Tensor_Scalar"]),
    ],
)
def test_simplify_keeps_the_value_and_drops_the_rest(function, calls):
    x = torch.randn(2, 3)
    found, outputs = simplified(function, x)
    assert found == calls
    torch.testing.assert_close(outputs[0], function(x))


def test_a_permutation_that_is_not_undone_stays():
    x = torch.randn(2, 3, 4)
    found, outputs = simplified(lambda x: x.permute(1, 2, 0).permute(1, 2, 0) + 1, x)
    assert len([c for c in found if "permute" in c]) == 2
    torch.testing.assert_close(outputs[0], x.permute(1, 2, 0).permute(1, 2, 0) + 1)


def test_cheap_results_of_the_forward_pass_are_computed_again():
    def step(x, w):
        h = x @ w
        gate = torch.sigmoid(h) * h
        loss = (gate * gate).sum()
        return loss, (gate * 3) @ w.t()  # the "backward pass": what follows the loss

    x, w = torch.randn(2, 3), torch.randn(3, 3)
    program = export(Call(step), (x, w), strict=False).run_decompositions()
    wanted = program.graph_module(x, w)
    graph_passes.recompute_cheap(program)
    nodes = list(program.graph.nodes)
    boundary = nodes.index(nodes[-1].args[0][0])
    kept = {
        str(source.target)
        for node in nodes[boundary + 1 : -1]
        for source in node.all_input_nodes
        if nodes.index(source) < boundary and source.op == "call_function"
    }
    assert kept == {"aten.mm.default"}
    assert sum("sigmoid" in str(n.target) for n in nodes) == 2
    for one, other in zip(program.graph_module(x, w), wanted, strict=True):
        torch.testing.assert_close(one, other)

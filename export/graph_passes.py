"""Rewrites of the forward+backward graph that make it small and fast without changing a value.

simplify         equal nodes are computed once; squares, double transposes and what changes nothing go
recompute_cheap  products, transposes and sigmoids of the forward pass are computed again in the backward pass
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.passes.dialect.common.cse_pass import CSEPass

aten = torch.ops.aten


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """Insert a call and run it on its arguments' fake tensors, so that later passes know its shape."""
    node = graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values)
    return node


def _finish(program: ExportedProgram) -> None:
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _is(node: Any, *names: str) -> bool:
    return (
        isinstance(node, Node)
        and node.op == "call_function"
        and any(name in str(node.target) for name in names)
    )


def _order(node: Any) -> list[int] | None:
    """The axes of a permutation, None for any other node."""
    if _is(node, "aten.permute"):
        return list(node.args[1])
    if _is(node, "aten.transpose"):
        axes = list(range(node.meta["val"].dim()))
        first, second = node.args[1], node.args[2]
        axes[first], axes[second] = axes[second], axes[first]
        return axes
    return None


def _changes_nothing(node: Node) -> bool:
    if _is(node, "aten.alias", "aten.detach"):
        return True
    if _is(node, "aten.expand", "aten.view", "aten._unsafe_view"):
        return list(node.args[0].meta["val"].shape) == list(node.meta["val"].shape)
    return False


def simplify(program: ExportedProgram) -> None:
    """x^2 -> x * x, x^1 -> x, a permutation undone by the next -> nothing, equal nodes -> one."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if _is(node, "_assert_tensor_metadata"):
            graph.erase_node(node)
            continue
        if node.op == "call_function" and _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            continue
        if _is(node, "aten.pow.Tensor_Scalar") and node.args[1] in (1, 2):
            base = node.args[0]
            with graph.inserting_before(node):
                square = node.args[1] == 2
                fresh = _call(graph, aten.mul.Tensor, base, base) if square else base
            node.replace_all_uses_with(fresh)
        outer = _order(node)
        inner = _order(node.args[0]) if outer else None
        if outer and inner and [inner[axis] for axis in outer] == sorted(outer):
            node.replace_all_uses_with(node.args[0].args[0])
    _finish(program)
    program._graph_module = CSEPass()(program.graph_module).graph_module
    _finish(program)


CHEAP = (
    "aten.mul.Tensor",
    "aten.sigmoid",
    "aten.permute",
    "aten.transpose",
    "aten.view",
    "aten.clone",
    "aten.expand",
    "aten.unsqueeze",
    "aten.squeeze",
    "aten.unbind",
    "aten.neg",
    "getitem",
)


def recompute_cheap(program: ExportedProgram) -> None:
    """Compute products, transposes and sigmoids of the forward pass anew in the backward pass, once each.

    What is kept between the passes are then the results of matrix products, sums and normalisers only.
    """
    graph = program.graph_module.graph
    nodes = list(graph.nodes)
    loss = next(n for n in nodes if n.op == "output").args[0][0]
    boundary = nodes.index(loss)
    forward = set(nodes[: boundary + 1])
    copies: dict[Node, Node] = {}

    def again(node: Node, before: Node) -> Node:
        if node not in forward or not _is(node, *CHEAP):
            return node
        if node not in copies:
            fresh = {i: again(i, before) for i in node.all_input_nodes}
            with graph.inserting_before(before):
                copies[node] = graph.node_copy(node, lambda i: fresh.get(i, i))
        return copies[node]

    for node in nodes[boundary + 1 :]:
        if node.op == "output":
            continue
        for source in list(node.all_input_nodes):
            replacement = again(source, node)
            if replacement is not source:
                node.replace_input_with(source, replacement)
    _finish(program)

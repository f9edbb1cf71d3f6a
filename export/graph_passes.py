"""Rewrites of the joint forward+backward graph that make it small and fast without changing a value.

simplify                    equal nodes are computed once; squares, double transposes and what changes nothing go
gather_backward             the gradient of seating tokens is a gather, not a scatter with accumulation
keep_weights_untransposed   W^T g becomes (g^T W)^T: activations are transposed, weights never
recompute_dequantisation    each backward use of a weight dequantises it anew, so none is kept between the passes
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.passes.dialect.common.cse_pass import CSEPass

aten = torch.ops.aten
SWAP = [0, 2, 1]


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


def _root(node: Node) -> Node:
    """The tensor whose values `node` holds, past ops that keep every value (indices are never negative)."""
    while _is(node, "view", "reshape", "clone", "alias", "clamp", "unsqueeze", "squeeze"):
        node = node.all_input_nodes[0]
    return node


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


def gather_backward(program: ExportedProgram) -> int:
    """Replace the scatter-adds behind `RoutedExperts`' two gathers; returns how many were replaced.

    A token sits in exactly k seats and a seat holds at most one assignment, so each direction's inverse is known.
    """
    graph = program.graph_module.graph
    # seat -> the scatter that inverts it
    inverse = {
        _root(n.args[2]): n for n in graph.nodes if _is(n, "aten.scatter.src") and n.args[1] == 0
    }
    replaced = 0
    for node in list(graph.nodes):
        if not (_is(node, "index_put") and len(node.args) == 4 and node.args[3]):
            continue
        index, gradient = _root(node.args[1][0]), node.args[2]
        with graph.inserting_before(node):
            if index in inverse:  # the way back: seats -> assignments
                assigned = inverse[index]
                seats, width = node.meta["val"].shape
                flat = _call(graph, aten.view.default, gradient, [-1, width])
                rows = _call(graph, aten.embedding.default, flat, assigned)
                empty = _call(graph, aten.full.default, [seats], 0.0)
                taken = _call(graph, aten.scatter.value, empty, 0, index, 1.0)
                column = _call(graph, aten.view.default, taken, [seats, 1])
                fresh = _call(graph, aten.mul.Tensor, rows, column)
            elif _is(index, "aten.div") and _root(index.args[0]) in inverse.values():
                seat = next(s for s, a in inverse.items() if a is _root(index.args[0]))
                tokens, width = node.meta["val"].shape
                flat = _call(graph, aten.view.default, gradient, [-1, width])
                rows = _call(graph, aten.embedding.default, flat, seat)
                each = _call(graph, aten.view.default, rows, [tokens, -1, width])
                fresh = _call(graph, aten.sum.dim_IntList, each, [1])
            else:
                continue
        node.replace_all_uses_with(fresh)
        replaced += 1
    _finish(program)
    return replaced


def _is_swap(node: Node) -> bool:
    return _is(node, "transpose") or (_is(node, "permute") and list(node.args[1]) == SWAP)


def _from_weight(node: Node) -> bool:
    while _is(node, "view", "clone", "alias", "expand"):
        node = node.all_input_nodes[0]
    return _is(node, "embedding_4bit")


def keep_weights_untransposed(program: ExportedProgram) -> None:
    """bmm(W^T, g) -> bmm(g^T, W)^T wherever W is a dequantised weight."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target != aten.bmm.default:
            continue
        left, right = node.args
        if not (_is_swap(left) and _from_weight(left.args[0])):
            continue
        with graph.inserting_before(node):
            swapped = (
                right.args[0]
                if _is_swap(right)
                else _call(graph, aten.permute.default, right, SWAP)
            )
            product = _call(graph, aten.bmm.default, swapped, left.args[0])
            node.replace_all_uses_with(_call(graph, aten.permute.default, product, SWAP))
    _finish(program)


def recompute_dequantisation(program: ExportedProgram) -> None:
    """Give each backward use of a dequantised weight its own dequantisation."""
    graph = program.graph_module.graph
    nodes = list(graph.nodes)
    loss = next(n for n in nodes if n.op == "output").args[0][0]
    weights = {n for n in nodes if _is(n, "embedding_4bit")}
    for node in nodes:
        inputs = node.all_input_nodes
        if (
            inputs
            and all(i in weights for i in inputs)
            and _is(node, "view", "permute", "transpose", "expand", "clone", "alias")
        ):
            weights.add(node)

    def again(node: Node, before: Node) -> Node:
        if node not in weights:
            return node
        fresh = {i: again(i, before) for i in node.all_input_nodes}
        with graph.inserting_before(before):
            return graph.node_copy(node, lambda i: fresh.get(i, i))

    for node in nodes[nodes.index(loss) + 1 :]:
        if node in weights:
            continue
        for source in list(node.all_input_nodes):
            if source in weights:
                node.replace_input_with(source, again(source, node))
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

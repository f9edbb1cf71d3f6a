"""Lower a captured graph to an ExecuTorch program and say how much memory it plans."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge,
    to_edge_transform_and_lower,
)
from executorch.exir.passes import MemoryPlanningPass
from torch.export import ExportedProgram

# The graph holds operators that the validity check does not know; memory formats are never used here.
CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


@dataclass(frozen=True)
class Lowered:
    """A program's bytes and the arena its memory plan asks for."""

    program: bytes
    arena_bytes: int


def lower(program: ExportedProgram) -> Lowered:
    """ExecuTorch program whose inputs stay outside of the arena."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        edge = to_edge(program, compile_config=CONFIG)
        lowered = edge.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)
            )
        )
    plan = lowered.executorch_program.execution_plan[0]
    return Lowered(bytes(lowered.buffer), sum(plan.non_const_buffer_sizes))


def lower_methods(programs: Mapping[str, ExportedProgram], delegated: Collection[str]) -> Lowered:
    """ExecuTorch program with several methods that only compute forward; in `delegated` ones XNNPACK runs what it can.

    Packed weights are inputs of our own operators, which XNNPACK leaves alone: its own 4-bit products round activations
    to 8 bits and take weights only as constants of the program.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations
        edge = to_edge_transform_and_lower(
            dict(programs),
            partitioner={name: [XnnpackPartitioner()] for name in delegated},
            compile_config=CONFIG,
        )
        lowered = edge.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False)
            )
        )
    plans = lowered.executorch_program.execution_plan
    return Lowered(bytes(lowered.buffer), max(sum(p.non_const_buffer_sizes) for p in plans))

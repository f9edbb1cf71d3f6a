"""Lower a captured graph to an ExecuTorch program and say how much memory it plans."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
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

"""bitsandbytes NF4 experts under stock PEFT LoRA, for machines with room for torch (Jetson). CPU works too.

The order that works: PEFT first, then quantise. `bnb.nn.parametrize.replace_parameter_4bit` before PEFT hides the
parameters from it (NoMatchingPeftModuleError); after PEFT it stacks two parametrizations, and peft 0.21.2 does not
find its `_LoraFactorsProxy` when it takes its own off again, so that every forward adds LoRA once more. Here an
expert tensor is NF4 at rest and an ordinary parameter only while its layer runs.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import nn

from edge.session import Artifact, Resident
from edge.session_torch import TorchBackend
from edge.submoe_torch import SubMoe, build


def quantise(experts: nn.Module, outer: nn.Module) -> None:
    """Turn the experts of one layer into NF4; hooks on the outermost PEFT wrapper unpack them for its forward."""
    packed: dict[str, tuple[torch.Tensor, Any]] = {}
    for name, parameter in experts.named_parameters(recurse=False):
        packed[name] = bnb.quantize_4bit(parameter.data.contiguous(), quant_type="nf4")
        parameter.data = torch.empty(0)

    def unpack(module: nn.Module, args: Any) -> None:
        for name, (data, state) in packed.items():
            getattr(experts, name).data = bnb.dequantize_4bit(data, state)

    def drop(module: nn.Module, args: Any, output: Any) -> None:
        for name in packed:
            getattr(experts, name).data = torch.empty(0)

    outer.register_forward_pre_hook(unpack)
    # Also when a recomputed forward is stopped early by checkpointing.
    outer.register_forward_hook(drop, always_call=True)


def build_nf4(artifact: Artifact, resident: Resident) -> SubMoe:
    """`submoe_torch.build` with NF4 experts; the LoRA-adapted weights of one layer at a time are kept for backward."""
    return build(artifact, resident, quantise)


def backend() -> TorchBackend:
    """The NF4 backend."""
    return TorchBackend("torch-nf4", build_nf4)

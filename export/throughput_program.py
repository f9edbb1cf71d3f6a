"""Write `edge/throughput.pte`: one packed product, for `python -m edge.throughput`.

    python -m export.throughput_program --out edge/throughput.pte

Only needed again when the operator's arguments or ExecuTorch's file format change.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from executorch.exir import EdgeCompileConfig, to_edge
from torch import Tensor, nn

from export import ops
from export.blob_store import write_atomically
from protocol import packing

TOKENS, WIDTH = 256, 1024


class Product(nn.Module):
    """[T, WIDTH] times a packed int4 matrix."""

    def forward(self, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        """[T, WIDTH]."""
        return ops.packed_linear(x, packed, scale, "int4", WIDTH)


def program() -> bytes:
    """The lowered program."""
    inputs = (
        torch.zeros(TOKENS, WIDTH),
        torch.zeros(packing.packed_bytes("int4", WIDTH, WIDTH), dtype=torch.uint8),
        torch.zeros(WIDTH * WIDTH // packing.GROUP, dtype=torch.float16),
    )
    captured = torch.export.export(Product(), inputs)
    edge = to_edge(captured, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    return bytes(edge.to_executorch().buffer)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; prints the file's path."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("edge/throughput.pte"))
    args = parser.parse_args(argv)
    write_atomically(args.out, program())
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

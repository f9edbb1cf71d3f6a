"""A checkpoint directory of any real configuration with random weights: python -m benchmarks.make_checkpoint.

    python -m benchmarks.make_checkpoint --config benchmarks/configs/olmoe_1b_7b.json --out DIR

Written tensor by tensor in bfloat16, in shards, experts one by one under the names that the hub's checkpoints have
(`--fused`: as [E, out, in]). Norms are 1, everything else is normal with the configuration's `initializer_range`. The
tokenizer is the reference base's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from export import families
from export.families.family import Family
from reference_base import MODEL_DIR

PIECE = 1 << 20  # elements drawn at a time


def tensors(config: dict[str, Any], family: Family, fused: bool) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything in the checkpoint, in the model's order."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    split = {
        path.format(layer=layer): (layer, family.split[projection])
        for projection, path in family.fused.items()
        for layer in family.moe_layers(config)
    }
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    found: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        if name in tied:
            continue
        if fused or name not in split:
            found[name] = shape
            continue
        layer, parts = split[name]
        for expert in range(shape[0]):
            for part in parts:
                own = part.format(layer=layer, expert=expert)
                found[own] = (shape[1] // len(parts), *shape[2:])
    return found


def shards(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Cut into shards of at most `limit` bytes."""
    part: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        bytes_ = 2 * torch.Size(shape).numel()
        if part and size + bytes_ > limit:
            yield part
            part, size = {}, 0
        part[name] = shape
        size += bytes_
    yield part


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], std: float, seed: int) -> int:
    """One safetensors file; bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            left = torch.Size(shape).numel()
            while left:
                count = min(left, PIECE)
                if "norm" in name:
                    values = torch.ones(count)
                else:
                    values = torch.randn(count, generator=generator) * std
                file.write(values.bfloat16().view(torch.uint8).numpy().data)
                left -= count
    return end


def make(config: dict[str, Any], out: Path, fused: bool, shard_bytes: int, seed: int) -> int:
    """Write the directory; bytes of all tensors."""
    out.mkdir(parents=True, exist_ok=True)
    family = families.of(config, "--config")
    parts = list(shards(tensors(config, family, fused), shard_bytes))
    where, total = {}, 0
    for number, shapes in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        total += write_shard(out / name, shapes, config["initializer_range"], seed + number)
        where |= dict.fromkeys(shapes, name)
        print(name, file=sys.stderr)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    shutil.copy(MODEL_DIR / "tokenizer.json", out / "tokenizer.json")
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="a config.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fused", action="store_true", help="experts of a layer in one tensor")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    config = json.loads(args.config.read_bytes())
    total = make(config, args.out, args.fused, int(args.shard_gb * 1e9), args.seed)
    print(f"{args.out}: {total / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

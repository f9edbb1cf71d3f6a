"""Frozen layers of a transformers skeleton whose matrices come packed, as inputs of the graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from export import ops


class PackedLinear(nn.Module):
    """Stands in for a frozen `nn.Linear`; `packed`, `scale` and `bias` are set before each forward."""

    weight = None  # Switch asks whether it is a tensor, and of which type

    def __init__(self, like: nn.Linear, format: str) -> None:
        super().__init__()
        self.format, self.out_features, self.in_features = (
            format,
            like.out_features,
            like.in_features,
        )
        self.packed: Tensor | None = None
        self.scale: Tensor | None = None
        # A parameter like any other: small, float, handed over by name.
        self.bias = like.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        assert self.packed is not None
        assert self.scale is not None
        y = ops.packed_linear(x, self.packed, self.scale, self.format, self.out_features)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """Stands in for a frozen `nn.Embedding`; `packed` and `scale` are set before each forward."""

    def __init__(self, like: nn.Embedding, format: str) -> None:
        super().__init__()
        self.format, self.width = format, like.embedding_dim
        # Gemma's embeddings are scaled; the skeleton keeps the factor as a number.
        self.factor = float(getattr(like, "scalar_embed_scale", 1.0))
        self.packed: Tensor | None = None
        self.scale: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., d]."""
        assert self.packed is not None
        assert self.scale is not None
        rows = ops.packed_embedding(ids, self.packed, self.scale, self.format, self.width)
        return rows if self.factor == 1.0 else rows * self.factor


STAND_INS = ((nn.Linear, PackedLinear), (nn.Embedding, PackedEmbedding))


def replace_packed(
    model: nn.Module, packed: Mapping[str, object], format: str
) -> dict[str, nn.Module]:
    """Put stand-ins where a packed weight belongs; returns name of the weight -> its stand-in.

    Raises
    ------
    TypeError
        A packed matrix that belongs to neither a linear layer nor an embedding.
    """
    made = {}
    for name in packed:
        path, _, leaf = name.rpartition(".")
        original = model.get_submodule(path)
        kind = next((new for old, new in STAND_INS if isinstance(original, old)), None)
        if kind is None or leaf != "weight":
            raise TypeError(f"{name}: {type(original).__name__} cannot be packed")
        parent, _, last = path.rpartition(".")
        made[name] = kind(original, format)
        setattr(model.get_submodule(parent), last, made[name])
    return made

"""What an encoder-decoder keeps for its backward pass (pure). The encoder passes the prompt, the decoder the answer.

Letters as in `seq2seq`. Trained experts stand in every n-th block; below the first of the encoder nothing is kept. The
decoder's cross-attention keeps keys and values of the whole prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

from protocol.manifest import BaseIndex, Shape


def kept(shapes: Mapping[str, tuple[int, ...]], base: BaseIndex, shape: Shape) -> int:
    """Floats that the backward pass needs of attention, feed-forward blocks, hidden states and experts.

    Parameters
    ----------
    shapes : the dense tensors, name -> shape
    """
    prompt, answer = shape.batch * shape.sequence, shape.batch * shape.answers
    blocks, first, total = int(base.config["num_layers"]), base.moe_layers[0], 0
    for name, size in shapes.items():
        stack, _, rest = name.partition(".block.")
        if not rest or len(size) != 2 or "relative" in name:
            continue
        block, attention = int(rest.partition(".")[0]), "Attention" in name
        if stack == "encoder" and (block < first or (attention and block == first)):
            continue
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        # An output projection needs its input, the result of attention; the others what they put out.
        width = {"o": size[1], "wo": 0}.get(leaf, size[0])
        whole = stack == "encoder" or name.endswith(
            ("EncDecAttention.k.weight", "EncDecAttention.v.weight")
        )
        total += width * (prompt if whole else answer)
    heads, s, k = int(base.config["num_heads"]), shape.sequence, shape.answers
    total += shape.batch * heads * s * s * max(0, blocks - 1 - first)
    decoder = int(base.config.get("num_decoder_layers") or blocks)
    total += shape.batch * heads * decoder * k * (k + s)
    # Inputs of the norms: two of a block in the encoder, three in the decoder.
    total += base.hidden * (2 * prompt * (blocks - first) + 3 * answer * decoder)
    up = base.features(base.projections[0])[0]
    sent = sum(prompt if layer < blocks else answer for layer in base.moe_layers)
    return total + sent * base.top_k * (up + base.hidden)

"""Every family's decoding graph, run by torch: chunks against a cache equal transformers' whole forward pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edge import decode, slots
from edge.decode import CachedDecoder, Opened, open_decoder, with_shape
from export import families, inference
from export.decode_graph import DecodeModel
from export.families import FamilyError
from protocol import tensors
from protocol.inference import Inference
from protocol.manifest import Slot
from tests.export.families import compare, setting

SLOTS = (Slot(format="int8", rank=4),) * 2 + (Slot(format="int4", rank=4),) * 2
CONTEXT, CHUNK = 16, 5


def opened(base, store, decoders=None):
    resident = setting.resident_of(base)
    artifact = setting.artifact(base, store, SLOTS)
    plan = Inference(
        protocol=2,
        base=base.base,
        profile="tiny",
        shape=artifact.manifest.shape,
        context=CONTEXT,
        chunk=CHUNK,
        experts={str(layer): ids for layer, ids in resident.items()},
        decoders=decoders or {},
    )
    adapter = setting.adapter(base, SLOTS, 0.1)
    return Opened(with_shape(artifact, plan), plan, adapter)


def eager(opened):
    """The graph that is exported, without any lowering, behind the edge's own cache."""
    artifact, plan, base = opened.artifact, opened.plan, opened.artifact.base
    family = families.of(base.config, "here")
    models = {
        name: DecodeModel(base, family, plan.shape, chunk, CONTEXT)
        for name, chunk in (("prefill", CHUNK), ("decode", 1))
    }
    dense = tensors.mapped(artifact.path(base.dense[plan.shape.dense]))
    given = {f"dense.{name}": value for name, value in dense.items()}
    given |= slots.router_inputs(dense, opened.resident)
    given |= slots.expert_inputs(
        base, plan.shape, opened.resident, lambda blob: tensors.mapped(artifact.path(blob))
    )
    given |= decode.adapter_inputs(opened)

    def call(method, changing):
        wanted = [s for s in models[method].specs if s.name in given]
        values = {**changing, **slots.check_inputs(given, wanted, method)}
        with torch.no_grad():
            found = models[method](
                *(torch.from_numpy(np.array(values[s.name])) for s in models[method].specs)
            )
        return dict(zip(models[method].output_names(), (f.numpy() for f in found), strict=True))

    return CachedDecoder(call, models["decode"].specs, plan, whole=False)


def logits_by_steps(decoder, tokens):
    """[K, V]: after a prompt of 7 tokens (a full chunk and a part of one), then after every further token."""
    found = [decoder.read(tokens[:7]), *(decoder.read([token]) for token in tokens[7:])]
    decoder.close()
    return np.stack(found)


def wanted(base, tokens):
    whole = np.zeros((setting.BATCH, setting.SEQUENCE), np.int64)
    whole[0, : len(tokens)] = tokens
    batch = replace(
        setting.batch(base.vocabulary),
        tokens=whole,
        positions=np.array([range(6, len(tokens))]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setting, "batch", lambda vocabulary: batch)
        return compare.transformers_logits(
            base, setting.resident_of(base), SLOTS, setting.adapter(base, SLOTS, 0.1)
        )[0]


def test_a_cached_step_is_the_whole_forward_pass_of_transformers(base):
    index, store, _ = base
    tokens = np.random.default_rng(1).integers(1, index.vocabulary, setting.SEQUENCE).tolist()
    found = logits_by_steps(eager(opened(index, store)), tokens)
    np.testing.assert_allclose(found, wanted(index, tokens), atol=1e-4)


@pytest.mark.slow
def test_lowered_to_executorch_and_onnx(base):
    index, store, _ = base
    tokens = np.random.default_rng(1).integers(1, index.vocabulary, setting.SEQUENCE).tolist()
    plain = opened(index, store)
    family = families.of(index.config, "here")
    decoders = {
        runtime: write(index, family, plain.plan, store)
        for runtime, write in inference.RUNTIMES.items()
    }
    complete = opened(index, store, decoders)
    for runtime in decode.RUNTIMES:
        found = logits_by_steps(open_decoder(runtime, complete, 1), tokens)
        np.testing.assert_allclose(found, wanted(index, tokens), atol=1e-4, err_msg=runtime)


def test_a_base_with_an_encoder_is_refused(base):
    index, _, _ = base
    seq2seq = replace(index, architecture="seq2seq")
    shape = setting.shape_of(index, SLOTS)
    with pytest.raises(FamilyError, match="only causal bases generate"):
        DecodeModel(seq2seq, families.of(index.config, "here"), shape, 2, 8)

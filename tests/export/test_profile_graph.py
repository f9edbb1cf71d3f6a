"""Full profiling, every family: the lowered programs on a device's loop against transformers' own forward pass."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from edge import profiling
from export import families, profile_graph
from export.families import FamilyError
from export.profile_programs import lower_profiling
from tests.export.families import setting, tiny, whole


def lend(artifact):
    """The folder's blobs, and which were asked for."""
    asked = []

    @contextlib.contextmanager
    def borrow(blob):
        asked.append(blob)
        yield artifact.path(blob)

    return borrow, asked


@pytest.fixture(params=list(tiny.CONFIGS))
def case(request, tmp_path):
    """(artifact, adapter of all experts, batches, profile)."""
    base, store = setting.sliced(request.param, tmp_path)
    artifact, adapter = whole.artifact(base, store), whole.adapter(base, 0.1)
    batches = [setting.batch(base.vocabulary, seed) for seed in range(3)]
    borrow, _ = lend(artifact)
    found = profiling.profile(
        artifact, borrow, batches, tmp_path / "flash", adapter=lambda: adapter
    )
    return artifact, adapter, batches, found


def test_statistics_are_those_of_transformers(case):
    artifact, adapter, batches, found = case
    wanted = whole.statistics(whole.model(artifact.base, adapter), artifact.base, batches)
    tokens = sum(batch.valid.sum() for batch in batches)
    assert found.tokens == tokens == 63
    for name, value in wanted.items():
        assert np.abs(value).max() > 1
        np.testing.assert_allclose(
            found.stats[name] / tokens, value / tokens, atol=1e-4, err_msg=name
        )
    np.testing.assert_allclose(found.stats["mass"].sum(-1), tokens, rtol=1e-5)


def test_only_causal_bases_with_frozen_experts(tmp_path):
    base, _ = setting.sliced("olmoe", tmp_path)
    with pytest.raises(FamilyError, match="only causal bases are profiled layer by layer"):
        profile_graph.check(dataclasses.replace(base, architecture="seq2seq"))
    with pytest.raises(FamilyError, match="no frozen weights to stream"):
        profile_graph.check(dataclasses.replace(base, projections=("adapter",)))


def test_slots_share_the_programs(tmp_path):
    base, store = setting.sliced("qwen2_moe", tmp_path)
    family, shape = families.of(base.config, "here"), setting.shape_of(base, setting.SLOTS)
    made = lower_profiling(base, family, shape, store)
    assert made.kinds == (0, 1)  # a dense layer, then one with experts
    said = []
    fewer = dataclasses.replace(shape, slots=tuple(kinds[:2] for kinds in shape.slots))
    assert lower_profiling(base, family, fewer, store, said.append) == made
    assert said == ["profiling: already there"]
    longer = dataclasses.replace(shape, sequence=shape.sequence + 1)
    assert lower_profiling(base, family, longer, store) != made


def test_a_layer_program_holds_no_weights(tmp_path):
    """Two layers of other weights, one program: the layers' tensors are inputs."""
    base, store = setting.sliced("olmoe", tmp_path)
    family = families.of(base.config, "here")
    made = profile_graph.LayerModel(base, family, 1, 2, 12, "int8")
    assert sum(p.numel() for p in made.parameters()) == 0
    given = [torch.from_numpy(np.zeros(s.shape, s.dtype)) for s in made.specs]
    given[0] += 1
    hidden, x, weight, expert, g = made(*given)
    assert torch.equal(hidden, given[0])  # zero weights: the residual alone
    assert x.abs().max() == 0
    torch.testing.assert_close(g, torch.full((24, 6), 1 / 6))
    assert weight.shape == expert.shape == (24, 2)

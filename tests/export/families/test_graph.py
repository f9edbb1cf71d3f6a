"""Every family's exported graph: in eager torch against transformers, in the ExecuTorch runtime against autograd."""

import dataclasses

import numpy as np
import pytest
import torch

from edge.session import load_backend
from export import families
from export.programs import lower_programs
from export.train_graph import SubModel
from tests.export.families import setting, tiny
from tests.export.families.test_parity import transformers_logits


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def base(request, tmp_path_factory):
    """(index, store) of one family."""
    return setting.sliced(request.param, tmp_path_factory.mktemp(request.param))


def test_the_graph_in_torch_is_transformers_with_absent_experts_masked(base):
    index, store = base
    artifact = setting.artifact(index, store, setting.SLOTS)
    resident, batch = setting.resident_of(index), setting.batch(index.vocabulary)
    adapter = setting.adapter(index, setting.SLOTS, 0.1)
    family = families.of(index.config, "here")
    model = SubModel(index, family, artifact.manifest.shape, evaluate=True)
    inputs = setting.graph_inputs(model.specs, artifact, resident, adapter, batch)
    with torch.no_grad():
        logits = model(*inputs)[0].numpy()
    wanted = transformers_logits(index, resident, setting.SLOTS, adapter, batch)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


@pytest.fixture(scope="module")
def lowered(base):
    """The artifact with programs."""
    index, store = base
    family, shape = families.of(index.config, "here"), setting.shape_of(index, setting.SLOTS)
    programs = lower_programs(index, family, shape, store, lambda message: None)
    return setting.artifact(index, store, setting.SLOTS, programs.train, programs.evaluate)


def test_gradients_in_the_runtime_are_those_of_autograd(lowered):
    base, resident = lowered.base, setting.resident_of(lowered.base)
    batch, adapter = setting.batch(base.vocabulary), setting.adapter(base, setting.SLOTS, 0.1)
    losses, gradients, routed = [], [], []
    for name in ("torch", "executorch"):
        session = load_backend(name).open_train(lowered, resident)
        session.load(adapter)
        loss, counts = session.forward_backward(batch)
        losses.append(loss)
        routed.append(counts)
        gradients.append({n: v.copy() for n, v in session.gradients().items()})
        session.close()
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert gradients[0].keys() == gradients[1].keys() == adapter.keys()
    for name, wanted in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], wanted, atol=2e-4, err_msg=name)
    assert max(np.abs(g).max() for g in gradients[0].values()) > 0.01
    for layer, counts in routed[0].items():
        np.testing.assert_array_equal(routed[1][layer], counts)


def test_the_runtime_measures_as_torch_does(lowered):
    base, resident = lowered.base, setting.resident_of(lowered.base)
    batch, adapter = setting.batch(base.vocabulary), setting.adapter(base, setting.SLOTS, 0.1)
    found = []
    for name in ("torch", "executorch"):
        session = load_backend(name).open_evaluate(lowered, resident)
        found.append(session.evaluate(batch, adapter))
        session.close()
    (wanted, stats), (logits, seen) = found
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    for layer in resident:
        for field in dataclasses.fields(stats[layer]):
            np.testing.assert_allclose(
                getattr(seen[layer], field.name),
                getattr(stats[layer], field.name),
                rtol=1e-4, atol=1e-3, err_msg=field.name,
            )  # fmt: skip

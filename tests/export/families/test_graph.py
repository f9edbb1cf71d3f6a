"""Every family's exported graph: in eager torch against transformers, in the ExecuTorch runtime against autograd."""

import dataclasses

import numpy as np
import pytest

from edge.session import PLAIN, Terms, load_backend
from export import families
from export.programs import lower_program
from tests.export.families import compare, setting

EVERY_TERM = Terms(
    label_smoothing=0.1, balance=0.3, target_balance=0.2, z_loss=0.05, cap=3, active=1
)


def test_the_graph_in_torch_is_transformers_with_absent_experts_masked(base):
    index, store, _ = base
    resident, adapter = setting.resident_of(index), setting.adapter(index, setting.SLOTS, 0.1)
    artifact = setting.artifact(index, store, setting.SLOTS)
    logits = compare.graph_logits(artifact, resident, adapter)
    wanted = compare.transformers_logits(index, resident, setting.SLOTS, adapter)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


def lowered(base, *, evaluate):
    """An artifact with one program."""
    index, store, _ = base
    family, shape = families.of(index.config, "here"), setting.shape_of(index, setting.SLOTS)
    program = lower_program(index, family, shape, store, evaluate=evaluate)
    return setting.artifact(index, store, setting.SLOTS, program, program)


def test_gradients_in_the_runtime_are_those_of_autograd(base):
    artifact = lowered(base, evaluate=False)
    resident = setting.resident_of(artifact.base)
    adapter = setting.adapter(artifact.base, setting.SLOTS, 0.1)
    bias = np.random.default_rng(8).normal(0, 2, artifact.base.vocabulary).astype(np.float32)
    for terms in (PLAIN, dataclasses.replace(EVERY_TERM, logit_bias=bias)):
        check_gradients(artifact, resident, adapter, terms)


def check_gradients(artifact, resident, adapter, terms):
    config = artifact.base.config
    made = families.of(config, "here").router_made(config)
    loss, wanted, routed = compare.gradients("torch", artifact, resident, adapter, terms)
    found_loss, found, found_routed = compare.gradients(
        "executorch", artifact, resident, adapter, terms
    )
    assert found_loss == pytest.approx(loss, abs=1e-4)
    assert found.keys() == wanted.keys() >= adapter.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-3, err_msg=name)
    assert max(np.abs(value).max() for value in wanted.values()) > 0.01
    # Of DeepSeek's groups a cap may leave too few experts: who then has a weight of 0 is not told apart.
    for layer, counts in routed.items() if terms == PLAIN or "group" not in made else ():
        np.testing.assert_array_equal(found_routed[layer], counts)


@pytest.mark.parametrize("model_type", ["deepseek_v3"])  # whose router is not a softmax
def test_the_runtime_measures_as_torch_does(model_type, sliced):
    artifact = lowered(sliced(model_type), evaluate=True)
    resident = setting.resident_of(artifact.base)
    adapter = setting.adapter(artifact.base, setting.SLOTS, 0.1)
    results = []
    for name in ("torch", "executorch"):
        session = load_backend(name).open_evaluate(artifact, resident)
        results.append(session.evaluate(setting.batch(artifact.base.vocabulary), adapter))
        session.close()
    (wanted, stats), (logits, seen) = results
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    for layer in resident:
        for field in dataclasses.fields(stats[layer]):
            np.testing.assert_allclose(
                getattr(seen[layer], field.name),
                getattr(stats[layer], field.name),
                rtol=1e-4, atol=1e-3, err_msg=field.name,
            )  # fmt: skip

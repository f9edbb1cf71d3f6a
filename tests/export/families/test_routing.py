"""Every family's `route` over the residents against the router of transformers with the others masked."""

import pytest
import torch

from edge.grouped_router_torch import GroupedRouter
from export import families
from export.families import FamilyError, group_limited
from tests.export.families import reference, tiny

HELD = {6: (5, 0, 3), 8: (6, 1, 0, 7)}  # of 8: two whole groups of four


def spread(weight, slot, experts, held=None):
    """[T, k] weights and slots -> [T, E]."""
    dense = torch.zeros(weight.shape[0], experts)
    ids = slot if held is None else torch.tensor(held)[slot]
    return dense.scatter_add(1, ids, weight)


@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("model_type", tiny.CONFIGS)
def test_routes_as_transformers_does(model_type, everyone):
    model = tiny.random_model(model_type)
    config = families.complete(model.config.to_dict(), "tiny")
    family = families.of(config, "tiny")
    layer, experts = family.moe_layers(config)[-1], family.num_experts(config)
    held = tuple(range(experts)) if everyone else HELD[experts]
    gate = reference.gate_of(model, family, layer)
    x = torch.randn(200, config["hidden_size"], generator=torch.Generator().manual_seed(1))
    rows = {
        name: dict(model.named_buffers())[path.format(layer=layer)][list(held)]
        for name, path in family.router_extra.items()
    }
    rows |= {name: value[list(held)] for name, value in family.router_made(config).items()}
    weight, slot = family.route(x @ gate.weight[list(held)].T, rows, config)
    assert weight.shape == slot.shape == (200, family.top_k(config))
    with torch.no_grad(), reference.masked(model, family, {layer: held}):
        _, wanted, chosen = gate(x)
    found = spread(weight, slot, experts, held)
    torch.testing.assert_close(found, spread(wanted, chosen, experts), atol=1e-5, rtol=1e-5)
    assert (found > 0).any(0)[list(held)].all()


@pytest.mark.parametrize("model_type", tiny.CONFIGS)
def test_probabilities_are_a_distribution(model_type):
    config = families.complete(tiny.config(model_type).to_dict(), "tiny")
    g = families.of(config, "tiny").probabilities(torch.randn(5, 8), config)
    torch.testing.assert_close(g.sum(-1), torch.ones(5))
    assert (g >= 0).all()


def test_a_group_without_residents_is_never_preferred():
    group = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])  # nobody of the second group is here
    found = group_limited.allowed(torch.tensor([[-0.5, -0.7]]), group, 2, 2)
    assert found.tolist() == [[1.0, 1.0]]


def test_a_class_that_is_not_supported_names_those_that_are():
    with pytest.raises(
        FamilyError, match="'mixtrall'.*did you mean 'mixtral'.*deepseek_v3, granit"
    ):
        families.of({"model_type": "mixtrall", "num_experts": 4}, "here")
    with pytest.raises(FamilyError, match="'bert' is not a Mixture"):
        families.of({"model_type": "bert"}, "here")


def test_quantised_weights_are_refused():
    config = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(FamilyError, match="quantised already"):
        families.of(config, "here")


def test_a_config_that_transformers_refuses_gives_one_line():
    with pytest.raises(FamilyError, match="^here: config.json: [^\n]*$"):
        families.complete({"model_type": "mixtral", "hidden_size": "wide"}, "here")


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_groups_with_one_resident_are_scored_as_the_slow_reference_does(model_type):
    config = families.complete(tiny.config(model_type).to_dict(), "tiny")
    family, held = families.of(config, "tiny"), [6, 1, 0, 3, 4]
    generator = torch.Generator().manual_seed(2)
    x, router = torch.randn(100, 64, generator=generator), torch.randn(5, 64, generator=generator)
    rows = {"group": family.router_made(config)["group"][held]}
    bias = torch.randn(5, generator=generator) if model_type == "deepseek_v3" else None
    slow = GroupedRouter(tiny.config(model_type), router, rows["group"], bias)
    if bias is not None:
        rows["bias"] = bias
    _, wanted, chosen = slow(x)
    weight, slot = family.route(x @ router.T, rows, config)
    torch.testing.assert_close(spread(weight, slot, 5), spread(wanted, chosen, 5))

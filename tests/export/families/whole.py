"""What transformers itself routes where: weights rounded as the blobs are, adapter merged, every expert there."""

from __future__ import annotations

import numpy as np
import torch

from export import families
from export.profile_programs import lower_profiling
from protocol import names
from tests.export.families import compare, reference, setting, tiny


def adapter(base, spread, rank=4, seed=1):
    """Random values for every expert of the base."""
    rng, values = np.random.default_rng(seed), {}
    for layer in base.moe_layers:
        for expert in range(base.num_experts):
            values[names.router_row(layer, expert)] = rng.normal(0, spread, base.hidden)
            for projection in base.projections:
                out, features = base.features(projection)
                a, b = (names.lora(layer, expert, projection, f) for f in names.FACTORS)
                values[a] = rng.normal(0, spread, (rank, features))
                values[b] = rng.normal(0, spread, (out, rank))
    return {name: value.astype(np.float32) for name, value in values.items()}


def artifact(base, store, kinds=setting.SLOTS):
    """With the programs of full profiling only."""
    import dataclasses

    family, shape = families.of(base.config, "here"), setting.shape_of(base, kinds)
    made = setting.artifact(base, store, kinds)
    profiling = lower_profiling(base, family, shape, store)
    return dataclasses.replace(
        made, manifest=dataclasses.replace(made.manifest, profiling=profiling)
    )


def model(base, given):
    """transformers' model with the blobs' weights and the adapter in it."""
    family = families.of(base.config, "here")
    made = tiny.random_model(base.model_type)
    reference.round_weights(made, family, base.moe_layers, "int8", {})
    compare.add_adapter(made, family, given)
    return made


@torch.no_grad()
def statistics(made, base, batches):
    """mass, top, g_log_g, output_norm [L, E] in float64, by hooks on a forward pass."""
    family = families.of(base.config, "here")
    sums = {n: np.zeros((len(base.moe_layers), base.num_experts)) for n in
            ("mass", "top", "g_log_g", "output_norm")}  # fmt: skip
    seen, handles = {}, []
    for layer in base.moe_layers:
        experts = made.get_submodule(family.block.format(layer=layer)).experts
        handles.append(
            experts.register_forward_pre_hook(
                lambda module, args, layer=layer: seen.__setitem__(layer, (module, *args))
            )
        )
    for batch in batches:
        made(torch.from_numpy(batch.tokens))
        valid = torch.from_numpy(batch.valid).reshape(-1) > 0
        for row, layer in enumerate(base.moe_layers):
            module, x, chosen, weight = seen[layer]
            x = x.reshape(-1, base.hidden)
            gate = reference.gate_of(made, family, layer)
            g = family.probabilities(x @ gate.weight.t(), base.config)[valid].double()
            floor = g.topk(base.top_k, -1)[0].amin(-1, keepdim=True)
            sums["mass"][row] += g.sum(0).numpy()
            sums["top"][row] += (g * (g >= floor)).sum(0).numpy()
            sums["g_log_g"][row] += (g * g.log()).sum(0).numpy()
            for expert in range(base.num_experts):
                one = torch.ones(len(x), 1)
                alone = module.forward(x, torch.full((len(x), 1), expert), one).norm(dim=-1)
                share = (weight * (chosen == expert)).sum(-1)
                sums["output_norm"][row, expert] += (alone * share)[valid].sum().item()
    for handle in handles:
        handle.remove()
    return sums

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from export import fft_adapter, verify_adapter
from export.families import fft_moe
from protocol import PROTOCOL_VERSION, names, tensors
from protocol.manifest import BaseIndex, Blob
from server.fft_adapter import fft_files
from tests.export.families import tiny_fft

E, K = tiny_fft.EXPERTS, tiny_fft.TOP_K


def base_of(model_type, config):
    nothing = Blob(sha256="0" * 64, bytes=0)
    return BaseIndex(
        protocol=PROTOCOL_VERSION,
        base="b" * 64,
        model_type=model_type,
        config=config,
        moe_layers=(0, 1),
        num_experts=E,
        top_k=K,
        hidden=64,
        intermediate=32,
        vocabulary=300,
        group=32,
        architecture="causal",
        projections=("adapter",),
        dense={"int8": nothing},
        tokenizer=nothing,
        experts={},
        error={},
        routing_prior=((1 / E,) * E,) * 2,
        peft=None,
    )


def write(folder, adapter, config, model_type="llama"):
    routers = {layer: fft_moe.fresh_router(layer, config) for layer in (0, 1)}
    files = fft_files(
        adapter, routers, base_of(model_type, config), version=3, base_name="some/model"
    )
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return routers


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_fft.write_dense(tmp_path_factory.mktemp("dense"), "llama")


def open_dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def config_of(folder):
    return fft_moe.with_experts(json.loads((folder / "config.json").read_bytes()), E, K, "here")


IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def by_hand(model, adapter, routers):
    """The model with every block's formula written out, token by token."""
    hooks = []
    for layer in (0, 1):
        rows = np.stack([adapter[names.router_row(layer, e)] for e in range(E)])
        w = torch.from_numpy(routers[layer] + rows)

        def add(module, args, output, layer=layer, w=w):
            flat, out = args[0].reshape(-1, 64), output.reshape(-1, 64).clone()
            for t, x in enumerate(flat):
                p = torch.softmax(w @ x, 0)
                best = sorted(range(E), key=lambda e: -float(p[e]))[:K]
                for e in best:
                    v = torch.from_numpy(adapter[names.lora(layer, e, "adapter", "lora_A")])
                    u = torch.from_numpy(adapter[names.lora(layer, e, "adapter", "lora_B")])
                    out[t] += p[e] / sum(p[b] for b in best) * (u @ F.silu(v @ x))
            return out.view(output.shape)

        hooks.append(model.model.layers[layer].mlp.register_forward_hook(add))
    with torch.no_grad():
        logits = model(IDS).logits
    for hook in hooks:
        hook.remove()
    return logits


def test_a_loaded_adapter_gives_the_logits_of_the_formula_and_can_be_removed(dense, tmp_path):
    adapter = tiny_fft.random_adapter()
    routers = write(tmp_path / "a", adapter, config_of(dense))
    model = open_dense(dense)
    with torch.no_grad():
        plain = model(IDS).logits
    wanted = by_hand(model, adapter, routers)
    assert (wanted - plain).abs().max() > 0.1
    assert fft_adapter.load(model, tmp_path / "a") is model
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-5)
    fft_adapter.remove(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain, atol=0, rtol=0)


def test_a_fresh_adapter_is_the_frozen_model(dense, tmp_path):
    adapter = tiny_fft.random_adapter()
    for name in adapter:
        if name.endswith("lora_B"):
            adapter[name] = np.zeros_like(adapter[name])
    write(tmp_path / "a", adapter, config_of(dense))
    model = open_dense(dense)
    with torch.no_grad():
        plain = model(IDS).logits
        after = fft_adapter.load(model, tmp_path / "a")(IDS).logits
    torch.testing.assert_close(after, plain, atol=0, rtol=0)


def damage(folder, change):
    path = folder / "fft_adapter.safetensors"
    state = tensors.decode(path.read_bytes())
    change(state)
    path.write_bytes(tensors.encode(state))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("layers.1.router"), "layers.1.router is missing"),
        (lambda s: s.update({"layers.7.router": np.zeros((4, 64), np.float32)}), "belongs nowhere"),
        (
            lambda s: s.update({"layers.0.experts.1.adapter.lora_B": np.zeros((3, 8), np.float32)}),
            "does not fit",
        ),
    ],
)
def test_a_damaged_adapter_gives_one_line_and_leaves_the_model_alone(dense, tmp_path, change, said):
    write(tmp_path / "a", tiny_fft.random_adapter(), config_of(dense))
    damage(tmp_path / "a", change)
    model = open_dense(dense)
    with pytest.raises(fft_adapter.FftAdapterError, match=said) as caught:
        fft_adapter.load(model, tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert not hasattr(model.model.layers[0].mlp, "adapter_experts")


def test_other_folders_and_other_classes_are_refused(dense, tmp_path):
    model = open_dense(dense)
    with pytest.raises(fft_adapter.FftAdapterError, match="no such file"):
        fft_adapter.load(model, tmp_path)
    write(tmp_path / "a", tiny_fft.random_adapter(), config_of(dense), model_type="qwen3")
    with pytest.raises(fft_adapter.FftAdapterError, match="trained on 'qwen3'"):
        fft_adapter.load(model, tmp_path / "a")
    write(tmp_path / "b", tiny_fft.random_adapter(), config_of(dense))
    fft_adapter.load(model, tmp_path / "b")
    with pytest.raises(fft_adapter.FftAdapterError, match="already"):
        fft_adapter.load(model, tmp_path / "b")


def test_verify_adapter_compares_the_loader_with_the_graph(dense, tmp_path, capsys):
    adapter = tiny_fft.random_adapter()
    write(tmp_path / "a", adapter, config_of(dense))
    (tmp_path / "a" / "adapter.safetensors").write_bytes(tensors.encode(adapter))
    assert verify_adapter.main([str(dense), str(tmp_path / "a")]) == 0
    assert "our loader equals the server's model" in capsys.readouterr().out
    swapped = dict(adapter)
    one, two = (names.lora(0, e, "adapter", "lora_B") for e in (0, 1))
    swapped[one], swapped[two] = adapter[two], adapter[one]
    (tmp_path / "a" / "adapter.safetensors").write_bytes(tensors.encode(swapped))
    assert verify_adapter.main([str(dense), str(tmp_path / "a")]) == 2
    assert "our loader differs from the server's model" in capsys.readouterr().err

"""The whole way out: the server's files, stock PEFT, and what happens when something is missing."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export.verify_adapter import main
from protocol import names, tensors
from protocol.manifest import read_base
from server import adapters, peft_adapter

RANK = 4


@pytest.fixture
def adapter(store, tiny_checkpoint, tmp_path):
    base = read_base(store / "base.json")
    rng = np.random.default_rng(0)
    state = adapters.fresh(base, RANK)
    for name in state:
        key = names.parse(name)
        if (key.layer, key.expert) in {(0, 1), (1, 3)} and key.factor != "lora_A":
            state[name] = rng.normal(size=state[name].shape).astype(np.float32) * 0.1
    dense = tensors.decode((store / "blobs" / base.dense["int8"].sha256).read_bytes())
    routers = {layer: dense[f"layers.{layer}.router"] for layer in base.moe_layers}
    files = peft_adapter.peft_files(state, routers, base, version=1, base_name=str(tiny_checkpoint))
    folder = tmp_path / "1"
    folder.mkdir()
    for name, data in {**files, "adapter.safetensors": tensors.encode(state)}.items():
        (folder / name).write_bytes(data)
    return folder


def test_stock_peft_equals_the_servers_model(tiny_checkpoint, adapter, capsys):
    assert main([str(tiny_checkpoint), str(adapter)]) == 0
    assert "2 experts changed" in capsys.readouterr().out


def drop_a_tensor(state):
    del state[next(n for n in state if "lora_B" in n)]


def swap_two_experts(state):
    name = next(n for n in state if "base_layer.lora_B" in n)
    columns = state[name].reshape(state[name].shape[0], RANK, 4)
    state[name] = np.ascontiguousarray(columns[:, :, [1, 0, 2, 3]]).reshape(state[name].shape)


def forget_a_router(state):
    name = next(n for n in state if "mlp.gate" in n)
    state[name] = state[name] * 0.5


@pytest.mark.parametrize("damage", [drop_a_tensor, swap_two_experts, forget_a_router])
def test_what_peft_would_lose_is_reported(tiny_checkpoint, adapter, capsys, damage):
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    damage(state)
    save_file(state, file)
    assert main([str(tiny_checkpoint), str(adapter)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("export.verify_adapter: ")


def test_folders_that_are_no_adapters(tiny_checkpoint, tmp_path, capsys):
    assert main([str(tiny_checkpoint), str(tmp_path / "absent")]) == 2
    assert "no such directory" in capsys.readouterr().err
    assert main([str(tiny_checkpoint), str(tmp_path)]) == 2
    assert "adapter.safetensors: no such file" in capsys.readouterr().err

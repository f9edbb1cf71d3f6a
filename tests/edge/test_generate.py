"""The reference base in three runtimes: the same greedy tokens, with and without an adapter; and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import OlmoeForCausalLM

from edge import generate as verb
from edge.decode import RUNTIMES, Picking, generate, open_decoder, pick
from export import families, inference, keys, publish
from export.blob_store import BlobStore
from export.checkpoint import Checkpoint
from export.slice_base import slice_base
from protocol import lora, names, tensors
from protocol.inference import read_inference
from protocol.manifest import Manifest, MemoryPlan, Shape, Slot, to_json
from reference_base import MODEL_DIR
from server import peft_adapter
from tests.export.families import reference
from tests.export.families.setting import NO_PROGRAM

HELD = {0: (3, 1, 7, 12, 0, 9), 1: (2, 15, 4, 8, 11), 2: (0, 5, 6, 14, 1, 10), 3: (13, 2, 9, 3)}
PROMPTS = ("The home team scored twice in the second", "A new study of distant galaxies")
TOKENS, RANK = 16, 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The reference base sliced, an artifact with four to six of sixteen experts a layer, and its programs."""
    root = tmp_path_factory.mktemp("store")
    checkpoint, store = Checkpoint(MODEL_DIR), BlobStore(root)
    family = families.of(checkpoint.config, "here")
    index = slice_base(checkpoint, family, store, lambda stage: None)
    (root / "base.json").write_bytes(to_json(index))
    formats = ("int8", "int8", "int4", "int4", "int4", "int4")
    slots = tuple(
        tuple(Slot(format=format, rank=RANK) for format, _ in zip(formats, ids, strict=False))
        for ids in HELD.values()
    )
    artifact = Manifest(
        protocol=index.protocol,
        base=index.base,
        profile="here",
        shape=Shape(batch=1, sequence=1, answers=1, dense="int4", slots=slots),
        train=NO_PROGRAM,
        evaluate=NO_PROGRAM,
        dense=index.dense["int4"],
        tokenizer=index.tokenizer,
        memory=MemoryPlan(
            budget=1, arena=0, inputs=0, parameters=0, optimizer=0, outputs=0, runtime=0
        ),
        experts={str(layer): ids for layer, ids in HELD.items()},
    )
    (root / "here").mkdir()
    (root / "here" / "manifest.json").write_bytes(to_json(artifact))
    arguments = ["--store", str(root), "--profile", "here", "--context", "48", "--chunk", "8"]
    assert inference.main(arguments) == 0
    return index, root


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Random, and large enough to change what is said: as the server writes it, with PEFT's form beside."""
    index, root = base
    rng = np.random.default_rng(0)
    values = {}
    for layer in index.moe_layers:
        for expert in range(index.num_experts):
            for projection in index.projections:
                out, features = index.features(projection)
                key = names.lora(layer, expert, projection, "lora_A")
                values[key] = lora.fresh_a(key, RANK, features)
                key = names.lora(layer, expert, projection, "lora_B")
                values[key] = rng.normal(0, 0.1, (out, RANK)).astype(np.float32)
            key = names.router_row(layer, expert)
            values[key] = rng.normal(0, 0.1, index.hidden).astype(np.float32)
    dense = tensors.mapped(root / "blobs" / index.dense["int4"].sha256)
    routers = {layer: dense[f"layers.{layer}.router"] for layer in index.moe_layers}
    files = peft_adapter.peft_files(values, routers, index, version=1, base_name=str(MODEL_DIR))
    folder = tmp_path_factory.mktemp("adapter")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "adapter.safetensors").write_bytes(tensors.encode(values))
    return folder


@pytest.fixture(scope="module")
def peft_only(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "adapter.safetensors").unlink()
    return folder


def transformers_tokens(index, root, adapter, prompt):
    """Stock transformers and stock PEFT, weights as the blobs round them, absent experts masked, `generate`."""
    family = families.of(index.config, "here")
    model = OlmoeForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    formats = {
        (layer, expert): "int8" if place < 2 else "int4"
        for layer, ids in HELD.items()
        for place, expert in enumerate(ids)
    }
    reference.round_weights(model, family, index.moe_layers, "int4", formats)
    if adapter is not None:
        PeftModel.from_pretrained(model, adapter)
    with reference.masked(model, family, HELD):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "adapter"])
def test_the_same_greedy_tokens_from_all_runtimes(base, adapter, peft_only, with_adapter):
    index, root = base
    tokenizer = Tokenizer.from_file(str(root / "blobs" / index.tokenizer.sha256))
    for text, folder in zip(PROMPTS, (adapter, peft_only), strict=True):
        prompt = tokenizer.encode(text).ids
        opened = verb.open_artifact(root / "here", folder if with_adapter else None)
        said = {}
        for runtime in RUNTIMES:
            decoder = open_decoder(runtime, opened, 1)
            said[runtime] = list(generate(decoder, prompt, TOKENS, Picking(), None))
            decoder.restart()
            assert list(generate(decoder, prompt, 3, Picking(), None)) == said[runtime][:3]
            decoder.close()
        wanted = transformers_tokens(index, root, peft_only if with_adapter else None, prompt)
        assert said == dict.fromkeys(RUNTIMES, wanted)
    other = verb.open_artifact(root / "here", None if with_adapter else adapter)
    decoder = open_decoder("onnx", other, 1)
    assert list(generate(decoder, prompt, TOKENS, Picking(), None)) != wanted


def test_xnnpack_runs_part_of_the_program(base):
    index, root = base
    plan = read_inference(root / "here" / "inference.json")
    program = (root / "blobs" / plan.decoders["executorch"].blob.sha256).read_bytes()
    assert b"XnnpackBackend" in program
    assert b"expertfleet::routed_experts" in program


def test_the_onnx_model_holds_no_weights(base):
    import onnx

    index, root = base
    plan = read_inference(root / "here" / "inference.json")
    path = root / "blobs" / plan.decoders["onnx"].blob.sha256
    onnx.checker.check_model(str(path))
    model = onnx.load(str(path), load_external_data=False)
    kinds = {node.op_type for node in model.graph.node}
    assert {"MatMulNBits", "GatherBlockQuantized"} <= kinds
    assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}
    inside = [t for t in model.graph.initializer if not t.external_data]
    assert sum(len(t.raw_data) for t in inside) < 100_000
    assert path.stat().st_size < 600_000


def test_the_command_prints_the_text(base, adapter, capsys):
    _, root = base
    arguments = ["--artifact", str(root / "here"), "--prompt", PROMPTS[0], "--tokens", "5"]
    assert verb.main([*arguments, "--adapter", str(adapter), "--runtime", "onnx"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(PROMPTS[0])
    assert len(text) > len(PROMPTS[0]) + 2
    assert verb.main([*arguments, "--temperature", "1.5", "--seed", "1", "--runtime", "onnx"]) == 0
    once = capsys.readouterr().out
    assert verb.main([*arguments, "--temperature", "1.5", "--seed", "1", "--runtime", "onnx"]) == 0
    assert capsys.readouterr().out == once


def fails(capsys, *arguments):
    """The one line on stderr."""
    assert verb.main(["--prompt", "hello", "--tokens", "4", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edge.generate: ")
    assert err.count("\n") == 1
    return err


def test_bad_input_is_one_line(base, adapter, peft_only, tmp_path, capsys):
    _, root = base
    there = ("--artifact", root / "here")
    assert "no manifest.json" in fails(capsys, "--artifact", tmp_path / "no" / "where")
    assert "no such directory" in fails(capsys, *there, "--adapter", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "neither adapter.safetensors" in fails(capsys, *there, "--adapter", tmp_path / "empty")
    assert "--tokens 0" in fails(capsys, *there, "--tokens", 0)
    assert "48 together wanted" in fails(capsys, *there, "--prompt", "word " * 60)
    assert "no tokens" in fails(capsys, *there, "--prompt", "")
    card = peft_only / "README.md"
    good = card.read_text()
    try:
        card.write_text(good.replace(base[0].base, "f" * 64))
        assert "adapter of base ffff" in fails(capsys, *there, "--adapter", peft_only)
    finally:
        card.write_text(good)


def copy(adapter, folder, change):
    """The adapter with changed tensors and no card."""
    folder.mkdir()
    values = dict(tensors.mapped(adapter / "adapter.safetensors"))
    (folder / "adapter.safetensors").write_bytes(tensors.encode(change(values)))
    return folder


def test_adapters_that_do_not_fit(base, adapter, peft_only, tmp_path, capsys):
    _, root = base
    there = ("--artifact", root / "here", "--adapter")
    key = names.lora(0, 3, "down", "lora_A")
    row = names.router_row(1, 2)
    missing = copy(adapter, tmp_path / "a", lambda v: {k: t for k, t in v.items() if k != row})
    assert f"{row} is missing" in fails(capsys, *there, missing)
    narrow = copy(adapter, tmp_path / "b", lambda v: {**v, key: v[key][:, :-1]})
    assert "float32 [R, 160] wanted" in fails(capsys, *there, narrow)
    wide = copy(adapter, tmp_path / "c", lambda v: {**v, key: np.repeat(v[key], 3, 0)})
    assert "rank 12, the program holds at most 4 (export.inference --rank 12)" in fails(
        capsys, *there, wide
    )
    broken = copy(adapter, tmp_path / "d", lambda v: {**v, row: v[row] * np.float32(np.nan)})
    assert "is not finite" in fails(capsys, *there, broken)
    config = peft_only / "adapter_config.json"
    good = config.read_text()
    try:
        config.write_text(json.dumps({"r": 4}))
        assert "no LoRA configuration" in fails(capsys, *there, peft_only)
    finally:
        config.write_text(good)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "adapter.safetensors").write_bytes(b"no tensors at all")
    assert "not a safetensors file" in fails(capsys, *there, tmp_path / "e")


def test_a_smaller_rank_fills_up(base, adapter, tmp_path):
    _, root = base

    def halve(values):
        return {
            k: v[:2] if k.endswith("lora_A") else v[:, :2] if k.endswith("lora_B") else v
            for k, v in values.items()
        }

    small = verb.open_artifact(root / "here", copy(adapter, tmp_path / "small", halve)).adapter
    whole = verb.open_artifact(root / "here", adapter).adapter
    key = names.lora(2, 14, "gate_up", "lora_B")
    assert small[key].shape == whole[key].shape == (320, RANK)
    np.testing.assert_array_equal(small[key][:, :2], whole[key][:, :2])
    assert not small[key][:, 2:].any()


def test_the_peft_form_says_the_same(base, adapter, peft_only):
    _, root = base
    own = verb.open_artifact(root / "here", adapter).adapter
    theirs = verb.open_artifact(root / "here", peft_only).adapter
    assert own.keys() == theirs.keys()
    for name, value in own.items():
        np.testing.assert_allclose(theirs[name], value, atol=1e-6)


def test_export_refuses(base, capsys):
    _, root = base
    for arguments, line in (
        (["--profile", "nobody"], "no such file"),
        (["--profile", "here", "--context", "100000"], "2 to 512 wanted"),
        (["--profile", "here", "--chunk", "1"], "2 to 256 wanted"),
        (["--profile", "here", "--rank", "0"], "1 to 4096 wanted"),
    ):
        assert inference.main(["--store", str(root), *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert line in err
        assert err.count("\n") == 1


def test_a_signed_store_wants_its_key(base, tmp_path, capsys):
    key = Ed25519PrivateKey.generate()
    copied = tmp_path / "store"
    shutil.copytree(base[1], copied, ignore=shutil.ignore_patterns("inference.json", "blobs"))
    (copied / "key.pub").write_bytes(keys.public_pem(key))
    arguments = ["--store", str(copied), "--profile", "here", "--context", "16", "--chunk", "4"]
    assert inference.main(arguments) == 2
    assert "is signed" in capsys.readouterr().err
    publish.write(copied / "here" / "inference.json", b"{}", key)
    key.public_key().verify((copied / "here" / "inference.sig").read_bytes(), b"{}")


def test_picking():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rng = np.random.default_rng(0)
    assert {pick(logits, Picking(1.0, 0.4), rng) for _ in range(50)} == {0}
    assert {pick(logits, Picking(1.0, 0.6), rng) for _ in range(50)} == {0, 1}
    drawn = [pick(logits, Picking(1.0), rng) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.3, 0.2], atol=0.03)

import json
from dataclasses import replace

import pytest

import device_profiles
from export import build, costs, families, items, outline, plan
from export.blob_store import BlobStore
from export.build import main
from export.plan import Choices
from export.programs import Programs
from export.train_graph import adapter_specs
from protocol.manifest import Program, Shape, Slot, TensorSpec, read_base, read_manifest

WIDEST = Slot(format="int8", rank=4)


def arguments(checkpoint, profile, out):
    return ["--checkpoint", str(checkpoint), "--profile", str(profile), "--out", str(out)]


def one_line(capsys):
    text = capsys.readouterr().err.strip().splitlines()
    return text[-1]


def test_the_selection_is_kept_and_the_prediction_is_within_budget(store):
    artifact = read_manifest(store / "small" / "manifest.json")
    base = read_base(store / "base.json")
    assert artifact.experts == {"0": (0, 1, 3), "1": (1, 2)}
    # There is room for all of them in the widest format and at the full rank.
    assert artifact.shape.slots == ((WIDEST,) * 3, (WIDEST,) * 2)
    assert artifact.dense == base.dense["int8"]
    assert artifact.base == base.base
    assert 0 < artifact.memory.predicted <= artifact.memory.budget == 32 << 20
    for blob in (artifact.train.blob, artifact.evaluate.blob, artifact.dense, artifact.tokenizer):
        assert (store / "blobs" / blob.sha256).stat().st_size == blob.bytes


def test_a_second_build_finds_the_programs(store, tiny_checkpoint, small_profile, capsys):
    before = sorted(p.name for p in (store / "blobs").iterdir())
    command = [
        *arguments(tiny_checkpoint, small_profile, store),
        "--experts",
        str(store / "selection.json"),
    ]
    assert main(command) == 0
    assert sorted(p.name for p in (store / "blobs").iterdir()) == before
    assert capsys.readouterr().out.strip().endswith("small")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--profile", "pixel_9"], "did you mean 'pixel_8'"),
        (["--scale-budget", "0.0001"], "do not fit"),
        (["--sequence", "4096"], "reads at most 64 tokens"),
        (["--answers", "16"], "1 to 15 wanted"),
        (["--rank", "-1"], "a positive number wanted"),
        (["--theta", "1.5"], "0 to 1 wanted"),
        (["--uplink-mb", "0"], "--uplink-mb 0.0: a positive number wanted"),
        (["--uplink-mb", "0.001"], "do not fit"),
        (["--deadline", "0.0001"], "time: about"),
        (["--scale-budget", "1", "--scale-budget", "2"], "given 2 times for 1 profiles"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tiny_checkpoint, small_profile, tmp_path, capsys, more, words
):
    assert main([*arguments(tiny_checkpoint, small_profile, tmp_path / "s"), *more]) == 2
    line = one_line(capsys)
    assert line.startswith("export.build: ")
    assert words in line
    assert not list((tmp_path / "s").glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nonsense", "not JSON"),
        ({"layers": {"0": [0, 1]}}, "0, 1 wanted"),
        ({"layers": {"0": [0, 1], "1": [0, 9]}}, "from 0 to 3 wanted"),
        ({"layers": {"0": [0, 1], "1": [2]}}, "at least 2 different ids"),
        ({"mass": [[1, 2]]}, "[2, 4] of numbers"),
        ({"mass": [[1, 2], ["a"]]}, "no table of numbers"),
        ({"mass": [[1] * 4] * 2, "utility": [[-1] * 4] * 2}, "utility of shape [2, 4] found"),
        ({"layers": 3}, "layers int found"),
        ({}, '"layers" or "mass"'),
    ],
)
def test_a_bad_experts_file_is_refused(
    tiny_checkpoint, small_profile, tmp_path, capsys, content, words
):
    path = tmp_path / "experts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    command = [*arguments(tiny_checkpoint, small_profile, tmp_path / "s"), "--experts", str(path)]
    assert main(command) == 2
    assert words in one_line(capsys)


def test_a_store_holds_one_base(store, small_profile, tmp_path, capsys, make_checkpoint):
    other = make_checkpoint(tmp_path / "other", intermediate_size=64)
    assert main(arguments(other, small_profile, store)) == 2
    assert "another base" in one_line(capsys)


def test_the_estimate_knows_the_lowered_program(store):
    artifact, base = (
        read_manifest(store / "small" / "manifest.json"),
        read_base(store / "base.json"),
    )
    dense, shape, train = costs.dense_of(base), artifact.shape, artifact.train
    trained = costs.spec_bytes(train.parameters)
    assert costs.inputs_bytes(base, dense, shape) == costs.spec_bytes(train.inputs) - trained
    assert costs.FLOAT * costs.parameter_floats(base, shape) == trained
    guess = costs.estimate(base, dense, shape, artifact.memory.budget).predicted
    assert 0.97 < guess / artifact.memory.predicted < 1.05
    # A blob is what it holds and a header; an outline has no headers.
    sketch = outline.of(base.config)
    for made, drawn in (
        (base.experts["int4"][0][0], sketch.experts["int4"][0][0]),
        (base.dense["int8"], sketch.dense["int8"]),
    ):
        assert 0 < made.bytes - drawn.bytes < 8192


def test_explain_says_where_every_byte_goes(store, tiny_checkpoint, small_profile, capsys):
    command = [
        *arguments(tiny_checkpoint, small_profile, store),
        *("--experts", str(store / "selection.json"), "--explain"),
    ]
    assert main(command) == 0
    text = capsys.readouterr().err
    memory = read_manifest(store / "small" / "manifest.json").memory
    assert f"{memory.predicted / 2**20:.1f} MB" in text
    assert f"{memory.arena / 2**20:.1f} MB" in text
    for words in ("32.0 MB", "3 int8 r4", "selected by hand", "flash", "uplink", "optimizer"):
        assert words in text


BASE = outline.of(
    families.complete(
        {
            "model_type": "olmoe",
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        "here",
    )
)


def lowered_with(arena):
    """What lowering gives, but for an arena that `arena` decides."""

    def lower(base, family, shape, store, advance):
        parts = {
            "blob": store.put(b"program"),
            "method": "forward",
            "inputs": (TensorSpec(name="dense", shape=(inputs(base, shape),), dtype="uint8"),),
            "parameters": tuple(adapter_specs(base, shape)),
            "outputs": (),
        }
        made = Program(arena_bytes=arena(base, shape), **parts)
        return Programs(train=made, evaluate=replace(made, arena_bytes=0))

    def inputs(base, shape):
        floats = costs.parameter_floats(base, shape)
        return costs.inputs_bytes(base, costs.dense_of(base), shape) + 4 * floats

    return lower


def built(monkeypatch, tmp_path, small_profile, arena):
    monkeypatch.setattr(build, "lower_programs", lowered_with(arena))
    # Nearly room for everything.
    everything = Shape(batch=2, sequence=16, answers=4, dense="int8", slots=((WIDEST,) * 8,) * 2)
    need = costs.estimate(BASE, costs.dense_of(BASE), everything, 0).predicted
    profile = device_profiles.load(small_profile)
    choices = Choices(scale_budget=(need + (300 << 10)) / profile.budget_bytes)
    return build.build(BASE, profile, tmp_path, choices, items.prior(BASE), lambda stage: None)


def estimated(base, shape):
    return costs.arena_bytes(base, costs.dense_of(base), shape)


def test_what_the_estimate_missed_costs_experts(monkeypatch, tmp_path, small_profile):
    right = built(monkeypatch, tmp_path / "a", small_profile, estimated)[0]
    more = built(
        monkeypatch, tmp_path / "b", small_profile, lambda b, s: estimated(b, s) + (700 << 10)
    )[0]
    kept = [sum(map(len, artifact.shape.slots)) for artifact in (right, more)]
    assert right.memory.predicted <= right.memory.budget
    assert more.memory.predicted <= more.memory.budget
    assert read_manifest(tmp_path / "b" / "small" / "manifest.json") == more
    assert right.shape != more.shape
    assert kept[1] <= kept[0]


def test_what_does_not_fit_is_not_shipped(monkeypatch, tmp_path, small_profile):
    with pytest.raises(plan.DoesNotFit, match="memory: about .* MB needed, the budget is"):
        built(monkeypatch, tmp_path, small_profile, lambda b, s: 14 << 20)
    assert not list(tmp_path.glob("*/manifest.json"))
    assert BlobStore(tmp_path).folder.is_dir()

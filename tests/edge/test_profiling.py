"""The loop of a full profile: files, one expert at a time, clipping by row, rows chosen; sums against the
evaluation."""

import contextlib
import dataclasses

import numpy as np
import pytest

from edge import profiling, slots
from edge.data import Row, evaluation_batches, prompter
from edge.fetch import BlobCache
from edge.profiling import batch_sums
from edge.rows_file import RowsFile
from edge.session import SessionError, load_backend
from edge.slots import SlotError
from protocol import tensors
from protocol.manifest import Blob, ManifestError, Slot, check_fits, parse_manifest, to_json
from protocol.messages import Task

TASK = Task(labels=("sport", "science", "finance"))


@pytest.fixture(scope="module")
def prompts(artifact, tokenizer):
    shape = artifact.manifest.shape
    return prompter(tokenizer, TASK, shape.batch, shape.sequence, shape.answers)


@pytest.fixture(scope="module")
def rows():
    words = "the bank team galaxy rate goal spectrum market captain".split()
    rng = np.random.default_rng(3)
    return [Row(" ".join(rng.choice(words, 1 + i % 5)), TASK.labels[i % 3]) for i in range(10)]


def lend(artifact, most=1):
    """Blobs one at a time: asking for another before the last is given back fails."""
    out, asked = [], []

    @contextlib.contextmanager
    def borrow(blob):
        out.append(blob)
        asked.append(blob.sha256)
        assert len(out) <= most
        yield artifact.path(blob)
        out.remove(blob)

    return borrow, asked


def run(artifact, prompts, rows, tmp_path, **more):
    borrow, asked = lend(artifact)
    batches = evaluation_batches(prompts, rows)
    found = profiling.profile(artifact, borrow, batches, tmp_path, labels=3, **more)
    return found, asked


def everything_resident(artifact):
    """The same base with a slot for each expert, int4 as it is profiled: what evaluation measures is exact then."""
    base, shape = artifact.base, artifact.manifest.shape
    kinds = ((Slot(format="int4", rank=4),) * base.num_experts,) * len(base.moe_layers)
    manifest = dataclasses.replace(artifact.manifest, shape=dataclasses.replace(shape, slots=kinds))
    return dataclasses.replace(artifact, manifest=manifest)


def test_it_is_what_evaluation_measures_with_every_expert_resident(whole, prompts, rows, tmp_path):
    base, large = whole.base, everything_resident(whole)
    resident = {layer: tuple(range(base.num_experts)) for layer in base.moe_layers}
    rng = np.random.default_rng(0)
    adapter = {
        n: rng.normal(0, 0.1, s).astype(np.float32)
        for n, s in slots.adapter_shapes(base, large.manifest.shape, resident).items()
    }
    found, asked = run(whole, prompts, rows, tmp_path, adapter=lambda: adapter)
    session = load_backend("torch").open_evaluate(large, resident)
    wanted = {n: np.zeros((2, 6)) for n in ("mass", "top", "g_log_g", "output_norm")}
    for batch in evaluation_batches(prompts, rows):
        _, stats = session.evaluate(batch, adapter)
        for row, layer in enumerate(base.moe_layers):
            for name, value in wanted.items():
                value[row] += getattr(stats[layer], name)
    session.close()
    for name, value in wanted.items():
        np.testing.assert_allclose(found.stats[name], value, rtol=1e-4, atol=1e-3, err_msg=name)
    assert not found.stats["trained_tokens"].any()
    assert asked == [b.sha256 for layer in base.experts["int4"] for b in layer]  # each once
    assert not list(tmp_path.iterdir())  # hidden states are gone
    held = {0: (0, 1), 1: (5,)}
    share = found.stats["mass"] / found.tokens
    want = [1 - share[0, :2].sum(), 1 - share[1, 5]]
    np.testing.assert_allclose(found.missed_mass(base.moe_layers, held), want, atol=1e-5)


def test_soft_counts_by_label(whole, prompts, rows, tmp_path):
    found, _ = run(whole, prompts, rows, tmp_path)
    np.testing.assert_allclose(found.label_mass.sum(0), found.stats["mass"], rtol=1e-5)
    one = [row for row in rows if row.label == "science"]
    alone, _ = run(whole, prompts, one, tmp_path)
    np.testing.assert_allclose(found.label_mass[1], alone.stats["mass"], rtol=1e-4)


def test_a_clip_is_by_row(whole, prompts, rows, tmp_path):
    """Each row alone, clipped by hand, and added up."""
    clip, total = 12.0, np.zeros((2, 6))
    norms = np.zeros((2, 6))
    for row in rows:
        alone, _ = run(whole, prompts, [row], tmp_path)
        total += alone.stats["mass"] * min(1.0, clip / alone.tokens)
        size = alone.stats["output_norm"].sum(-1, keepdims=True)
        norms += alone.stats["output_norm"] * np.minimum(1, clip * 32**0.5 / size)
    found, _ = run(whole, prompts, rows, tmp_path, clip=clip)
    np.testing.assert_allclose(found.stats["mass"], total, rtol=1e-4)
    np.testing.assert_allclose(found.stats["output_norm"], norms, rtol=1e-4)
    plain, _ = run(whole, prompts, rows, tmp_path)
    assert found.tokens < plain.tokens
    # The server refuses more mass than tokens.
    assert found.stats["mass"].sum(-1).max() <= found.tokens * 1.001 + 1


def test_noise_is_the_devices_own(whole, prompts, rows, tmp_path):
    plain, _ = run(whole, prompts, rows, tmp_path, clip=12.0)
    one, asked = run(whole, prompts, rows[:1], tmp_path, clip=12.0, noise=0.1)
    other, _ = run(whole, prompts, rows[:1], tmp_path, clip=12.0, noise=0.1)
    assert (one.stats["mass"] != other.stats["mass"]).any()
    assert one.stats["mass"].sum(-1).max() <= one.tokens * 1.001 + 1
    assert len(asked) == 12  # whether an expert had a token cannot be seen from what is fetched
    assert plain.stats["mass"].shape == one.stats["mass"].shape
    with pytest.raises(ValueError, match="hides nothing"):
        run(whole, prompts, rows, tmp_path, noise=1.0)


def test_an_expert_without_tokens_is_not_fetched(whole, prompts, rows, tmp_path):
    found, asked = run(whole, prompts, rows[:1], tmp_path)
    used = found.stats["output_norm"] > 0
    assert (~used).any()
    fetched = [[blob.sha256 in asked for blob in layer] for layer in whole.base.experts["int4"]]
    np.testing.assert_array_equal(used, fetched)


def test_peak_and_quantile_by_hand():
    g = np.array([[[0.6, 0.4], [0.1, 0.9]], [[0.3, 0.7], [1.0, 0.0]]], np.float32)
    valid = np.array([[True, True], [True, False]])
    sums = batch_sums(g, valid, 1)
    np.testing.assert_allclose(sums["peak"], [0.6, 0.9])
    np.testing.assert_allclose(sums["high"], [0.6, 0.9])  # ceil(4 / 100) = 1
    np.testing.assert_allclose(sums["top"], [[0.6, 0.9], [0.0, 0.7]], rtol=1e-6)
    many = np.random.default_rng(0).dirichlet(np.ones(3), (2, 120)).astype(np.float32)
    third = np.sort(many.reshape(-1, 3), 0)[-3]  # ceil(240 / 100) = 3
    np.testing.assert_allclose(batch_sums(many, np.ones((2, 120), bool), 1)["high"], third)
    assert not batch_sums(g, np.zeros((2, 2), bool), 1)["peak"].any()


def test_rows_are_sampled_or_as_many_as_are_held_back():
    train, held = [Row(f"t{i}") for i in range(20)], [Row(f"h{i}") for i in range(5)]
    both = profiling.choose_rows(train, held, 0, 4, 7)
    assert both[:5] == held
    assert len(both) == 10
    few = profiling.choose_rows(train, held, 6, 4, 7)
    assert len(set(few)) == 6
    assert (
        few
        == profiling.choose_rows(train, held, 6, 4, 7)
        != profiling.choose_rows(train, held, 6, 4, 8)
    )
    assert len(profiling.choose_rows(train, held, 1000, 4, 7)) == 25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.0.router.6": np.zeros(32, np.float32)}, "'layers.0.router.6' is float32"),
        ({"layers.0.router.1": np.zeros(31, np.float32)}, r"\(31,\), no part"),
        ({"layers.0.router.1": np.zeros(32)}, "float64"),
        ({"layers.1.experts.2.up.lora_A": np.zeros((4, 32), np.float32)}, "no part of the base"),
        ({"layers.0.router.1": np.full(32, np.nan, np.float32)}, "layers.0.router.1 is not finite"),
    ],
)  # fmt: skip
def test_a_strange_adapter_is_refused(whole, prompts, rows, tmp_path, change, words):
    with pytest.raises(SlotError, match=words):
        run(whole, prompts, rows[:1], tmp_path, adapter=lambda: change)


def test_a_blob_of_another_shape_is_refused(whole, prompts, rows, tmp_path):
    strange = tmp_path / "strange"
    strange.write_bytes(tensors.encode({"gate_up.packed": np.zeros((2, 2), np.uint8)}))

    @contextlib.contextmanager
    def borrow(blob):
        yield strange

    with pytest.raises(SessionError, match=r"gate_up.packed is uint8 \(4,\)"):
        profiling.profile(whole, borrow, evaluation_batches(prompts, rows), tmp_path)
    bare = dataclasses.replace(whole, manifest=dataclasses.replace(whole.manifest, profiling=None))
    with pytest.raises(SessionError, match="no programs that profile"):
        run(bare, prompts, rows, tmp_path)


def test_a_manifest_with_and_without_profiling(whole):
    import json

    text = json.loads(to_json(whole.manifest))
    assert parse_manifest(text, "m") == whole.manifest
    check_fits(whole.manifest, whole.base, "m")
    for key, value, words in (
        ("kinds", [0], "profiling of 1 layers, 2 wanted"),
        ("kinds", [0, 1], "a layer without a program"),
        ("format", "int2", "experts in 'int2'"),
    ):
        broken = {**text, "profiling": {**text["profiling"], key: value}}
        with pytest.raises(ManifestError, match=words):
            check_fits(parse_manifest(broken, "m"), whole.base, "m")
    del text["profiling"]
    assert parse_manifest(text, "m").profiling is None


class Shelf:
    """A server that has one blob."""

    def __init__(self, data):
        import hashlib

        self.url, self.data, self.times = "http://here", data, 0
        self.blob = Blob(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    def open(self, path, headers, body=None):
        import io

        self.times += 1
        answer = io.BytesIO(self.data)
        answer.status = 200
        return answer

    def retry(self, what, attempt):
        return attempt()


def test_a_borrowed_blob_goes_unless_it_was_there_or_may_stay(tmp_path):
    shelf = Shelf(b"x" * 100)
    cache = BlobCache(shelf, tmp_path / "a")
    for _ in range(2):
        with cache.borrow(shelf.blob) as path:
            assert path.read_bytes() == shelf.data
        assert not path.exists()
    assert shelf.times == 2
    cache.get(shelf.blob)
    with cache.borrow(shelf.blob) as path:
        pass
    assert path.exists()
    roomy, tight = BlobCache(shelf, tmp_path / "b", 100), BlobCache(shelf, tmp_path / "c", 99)
    for cache, stays in ((roomy, True), (tight, False)):
        with cache.borrow(shelf.blob) as path:
            pass
        assert path.exists() == stays
    with pytest.raises(KeyError), tight.borrow(shelf.blob) as path:
        raise KeyError
    assert not path.exists()


def test_rows_on_flash_are_rows_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    file, array = RowsFile(tmp_path, 5), np.zeros((40, 5), np.float32)
    for start in (0, 20, 10, 30):
        array[start : start + 10] = rng.random((10, 5))
        file.write(start, array[start : start + 10])
    ids = np.flatnonzero(rng.random(40) < 0.6)
    np.testing.assert_array_equal(file.take(ids), array[ids])
    np.testing.assert_array_equal(file.read(7, 9), array[7:16])
    change = rng.random((len(ids), 5)).astype(np.float32)
    file.add(ids, change)
    array[ids] += change
    np.testing.assert_array_equal(file.read(0, 40), array)
    assert file.take(np.array([], np.int64)).shape == (0, 5)
    assert (file.rows, file.bytes) == (40, 800)
    with pytest.raises(IndexError):
        file.read(39, 2)
    file.close()

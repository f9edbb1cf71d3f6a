import numpy as np

from edge.kept import Kept

ARRAYS = {"a": np.arange(3, dtype=np.float32), "scaffold.b": np.ones((2, 2), np.float32)}


def test_kept_for_one_run(tmp_path):
    kept = Kept(tmp_path)
    assert kept.read("r1") == {}
    kept.write("r1", ARRAYS)
    found = Kept(tmp_path).read("r1")
    assert found.keys() == ARRAYS.keys()
    assert all(np.array_equal(found[n], ARRAYS[n]) for n in found)
    assert kept.read("r2") == {}
    # What is mapped may be written again: the old file lives until nobody looks at it.
    kept.write("r1", {**found, "c": np.zeros(1, np.float32)})
    assert set(kept.read("r1")) == {"a", "scaffold.b", "c"}
    assert np.array_equal(found["a"], ARRAYS["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_what_training_has_no_use_for_is_left_out(tmp_path):
    kept = Kept(tmp_path)
    kept.write("r1", {**ARRAYS, "residual.a": np.ones(3, np.float32)})
    assert kept.read("r1", without=("residual.", "basis.")).keys() == ARRAYS.keys()
    assert "residual.a" in kept.read("r1")


def test_a_spoilt_file_is_nothing(tmp_path, caplog):
    kept = Kept(tmp_path)
    for data in (b"", b"x" * 100):
        kept.path.write_bytes(data)
        assert kept.read("r1") == {}
    assert "dropped" in caplog.text
    kept.write("r1", {"a": np.float32([np.nan]), "b": np.zeros(1, np.float32)})
    assert set(kept.read("r1")) == {"b"}

import json
import re

import pytest

import device_profiles
from device_profiles import measure
from device_profiles.measure import MeasureError
from export import costs, outline, plan
from reference_base import MODEL_DIR


@pytest.fixture
def fake_runtime(monkeypatch):
    monkeypatch.setattr(measure, "throughput", lambda: (12.345, "counted on fingers"))
    monkeypatch.setattr(measure, "copy_gb_s", lambda: 9.87)


def test_the_profile_loads(tmp_path, fake_runtime, capsys):
    out = tmp_path / "mine.toml"
    assert measure.main(["--name", "mine", "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    profile = device_profiles.load(out)
    assert (profile.name, profile.gflops, profile.memory_gb_s) == ("mine", 12.35, 9.9)
    assert 0 < profile.budget_mb <= profile.memory_mb
    assert 0 < profile.flash_budget_mb < profile.flash_mb
    # A minute at 45.7 Mbit/s.
    assert profile.uplink_mb == pytest.approx(60 * 45.7e6 / 8 / 2**20, abs=0.1)
    assert "gflops: counted on fingers" in profile.sources
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_the_planner_can_use_it(tmp_path, fake_runtime):
    out = tmp_path / "mine.toml"
    assert measure.main(["--name", "mine", "--out", str(out)]) == 0
    config = json.loads((MODEL_DIR / "config.json").read_bytes())
    base = outline.of(config)
    found = plan.choose(base, costs.dense_of(base), device_profiles.load(out), plan.Choices())
    assert (found.used <= found.budget.limits).all()


def test_memory_is_that_of_the_container_where_it_has_a_limit(tmp_path):
    info, group, none = tmp_path / "meminfo", tmp_path / "limit", tmp_path / "max"
    info.write_text("MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:  4194304 kB\n")
    group.write_text(str(1 << 30))
    none.write_text("max\n")
    assert measure.memory_mb(info, [none, tmp_path / "missing"]) == (8192, 4096)
    assert measure.memory_mb(info, [none, group]) == (1024, 1024)
    info.write_text("nothing")
    with pytest.raises(MeasureError, match="no MemTotal"):
        measure.memory_mb(info)


def test_copying_has_a_speed():
    assert 0.1 < measure.copy_gb_s(0.05) < 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "a b"], "letters, digits, - and _ wanted"),
        (["--out", "nowhere/mine.toml"], "in a folder that exists wanted"),
        (["--out", "mine.json"], "a .toml file"),
        (["--server", "ftp://x"], "http://HOST:PORT wanted"),
        (["--server", "http://127.0.0.1:1"], "http://127.0.0.1:1/v1/link: "),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tmp_path, monkeypatch, fake_runtime, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    given = {"--name": "mine", "--out": "mine.toml"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert measure.main([word for pair in given.items() for word in pair]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_fails_is_quoted(monkeypatch):
    monkeypatch.setenv("EXPERTFLEET_NATIVE", "/nowhere/native.so")
    with pytest.raises(MeasureError, match=r"^edge.throughput: /nowhere/native.so"):
        measure.throughput()


def test_throughput_of_the_runtime_that_trains():
    rate, how = measure.throughput()
    assert rate > 0.1
    assert re.search(r"ExecuTorch, \d+ threads", how)

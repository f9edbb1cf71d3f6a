import argparse
import json
import sys
from dataclasses import replace

import pytest

import reference_base
from lab import artifacts, dataset, fleet, prepare, run
from lab.fleet import Plan
from lab.scenario import Artifact


def options(*words):
    return run._parser().parse_args(list(words))


def test_flags_overrule_the_scenario():
    chosen = run.settings(
        options("--rounds", "2", "--devices", "3", "--alpha", "9", "--scale-budget", "2")
    )
    whole = run.settings(options())
    assert chosen.server.rounds == 2
    assert len(chosen.device) == 3
    assert chosen.server.min_updates <= 3
    assert chosen.data.alpha == 9
    assert chosen.device[0].scale_budget == pytest.approx(2 * whole.device[0].scale_budget)
    assert chosen.server.steps == whole.server.steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "rounds 0 found"),
        (["--scenario", "nowhere.toml"], "no such file"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--base", "nowhere"], "tokenizer"),
    ],
)
def test_mistakes_end_with_one_line_and_2(words, message, capsys, tmp_path):
    assert run.main([*words, "--out", str(tmp_path / "o"), "--cache", str(tmp_path / "c")]) == 2
    text = capsys.readouterr().err
    assert text.startswith("lab: ")
    assert text.count("\n") == 1
    assert message in text


def test_a_folder_that_is_no_run_is_not_replaced(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(prepare.FolderError, match="something else than a run"):
        prepare.fresh_folder(tmp_path)
    assert (tmp_path / "letters.txt").exists()
    (tmp_path / prepare.MARK).write_text("{}")
    assert list(prepare.fresh_folder(tmp_path).iterdir()) == []


def test_every_device_gets_its_own_rows_and_the_test_rows_stay_here(tmp_path):
    chosen = run.settings(options("--devices", "2"))
    split = prepare.divide(dataset.assistant_rows(40, 0), chosen)
    task, test, files = prepare.write_data(tmp_path, split, chosen)
    assert json.loads(task.read_text())["labels"] == list(split.labels)
    parts = [{row.text for row in dataset.load(path)} for path in (test, *files.values())]
    assert len(parts) == 3
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_batch_follows_from_the_tokens_of_a_step(tmp_path):
    if not (reference_base.MODEL_DIR / "tokenizer.json").exists():
        pytest.skip("the reference base is not in this checkout")
    chosen = run.settings(options())
    short = prepare.fit_sequence(
        chosen, [dataset.Row("a b", "x", "x")] * 9, reference_base.MODEL_DIR
    )
    long = prepare.fit_sequence(
        chosen, [dataset.Row("word " * 400, "x", "x")] * 9, reference_base.MODEL_DIR
    )
    assert (short.artifact.sequence, short.artifact.batch) == (32, 16)
    assert (long.artifact.sequence, long.artifact.batch) == (64, 8)


def plan(tmp_path, **more):
    fields = {
        "store": tmp_path / "store", "base": tmp_path / "base", "folder": tmp_path,
        "task": tmp_path / "task.json", "test": tmp_path / "test.jsonl",
        "data": {"orin": tmp_path / "o.jsonl"}, "backend": "executorch", "broker": "auto",
        "enforce": {"orin": "rlimit"},
    }  # fmt: skip
    return Plan(**{**fields, **more})


def test_commands_are_understood_by_the_real_programs(tmp_path):
    from edge.__main__ import parse as parse_edge
    from server.config import _parser as server_parser

    chosen = run.settings(options("--devices", "1"))
    module, *words = fleet.server_command(plan(tmp_path), chosen)
    assert module == "server"
    found = server_parser().parse_args(words)
    assert found.rounds == chosen.server.rounds
    assert found.objective == tmp_path / "objective.json"  # the demo has one of its own
    plain = replace(chosen, server=replace(chosen.server, objective=None))
    assert "--objective" not in fleet.server_command(plan(tmp_path), plain)
    module, *words = fleet.edge_command(plan(tmp_path), chosen, chosen.device[0], "http://h:1")
    assert module == "edge"
    assert parse_edge(words).enforce == "rlimit"


def test_server_address_is_read_from_its_log(tmp_path):
    from lab.processes import ProcessError, Processes

    (tmp_path / "talker.py").write_text(
        "import time; print('x'); time.sleep(0.2); print('listening on http://h:1 broker b')\n"
        "time.sleep(30)"
    )
    (tmp_path / "mute.py").write_text("import sys; print('server: no store'); sys.exit(2)")
    environment = {"PYTHONPATH": str(tmp_path)}
    with Processes(tmp_path / "logs") as processes:
        child = processes.start("t", ["talker"], environment=environment)
        assert fleet.wait_for_url(child) == "http://h:1"
        child = processes.start("m", ["mute"], environment=environment)
        with pytest.raises(ProcessError, match="exit status 2: server: no store"):
            fleet.wait_for_url(child)


def test_cache_key_changes_with_all_that_matters(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    one = artifacts.key(tmp_path, Artifact(), 5, {"pixel_8": 0.5})
    assert one == artifacts.key(tmp_path, Artifact(), 5, {"pixel_8": 0.5})
    others = [
        artifacts.key(tmp_path, Artifact(rank=8), 5, {"pixel_8": 0.5}),
        artifacts.key(tmp_path, Artifact(), 6, {"pixel_8": 0.5}),
        artifacts.key(tmp_path, Artifact(), 5, {"pixel_8": 0.6}),
    ]
    (tmp_path / "model.safetensors").write_bytes(b"2")
    others.append(artifacts.key(tmp_path, Artifact(), 5, {"pixel_8": 0.5}))
    assert len({one, *others}) == 5


def test_a_failed_build_leaves_no_store(tmp_path):
    from lab.processes import Processes

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    with (
        Processes(tmp_path / "logs") as processes,
        pytest.raises(artifacts.ArtifactError, match=r"^export\.build: "),
    ):
        artifacts.build(
            processes, base, Artifact(sequence=32, batch=2), 5, {"pixel_8": 1.0}, tmp_path, 1
        )
    assert not [p for p in tmp_path.glob("store-*") if not p.name.endswith(".partial")]


def test_enforcement_is_said_per_device():
    with run.enforcement("rlimit", ["a", "b"]) as limits:
        assert limits == {"a": "rlimit", "b": "rlimit"}
    with run.enforcement("auto", ["a"]) as limits:
        assert limits["a"] == "rlimit" or limits["a"].startswith("cgroup:/")


def test_the_lab_itself_imports_no_torch():
    import subprocess

    code = "import lab.run, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert isinstance(options(), argparse.Namespace)


def test_profiles_of_one_budget_go_to_one_builder(tmp_path):
    profiles = {"pixel_8": 0.5, "phone_4gb": 0.25, "jetson_orin": 0.1, "galaxy_s24": 0.5}
    commands = dict(artifacts._commands(tmp_path, Artifact(), 5, profiles, tmp_path, 2))
    hands = [
        [words[i + 1] for i, word in enumerate(words) if word == "--profile"]
        for words in commands.values()
    ]
    assert hands == [["jetson_orin", "phone_4gb"], ["pixel_8", "galaxy_s24"]]
    scales = [
        w
        for i, w in enumerate(commands["build-0"])
        if commands["build-0"][i - 1] == "--scale-budget"
    ]
    assert scales == ["0.1", "0.25"]
    assert len(dict(artifacts._commands(tmp_path, Artifact(), 5, profiles, tmp_path, 16))) == 3

"""The command line of the scoreboard and its schedule: what is done is not done again, what fails ends nothing else."""

import gzip
import importlib.util
import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.federated import __main__ as command
from benchmarks.federated import schedule
from benchmarks.federated.methods import ABLATIONS, METHODS, SELECTION, UPLINK
from benchmarks.federated.plan import Task
from benchmarks.federated.suites import Suite
from reference_base import MODEL_DIR

TINY = Suite(
    name="tiny", number=98, tasks=("agnews",), alpha=0.5, budget=0.5, clients=3, rounds=1, per_round=2, steps=1,
    batch=4, sequence=24, answers=2, rows_each=12, held_back=4, validation=8, test=8,
)  # fmt: skip
WORDS = "river stone market winter council engine harvest signal garden border letter".split()


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A base of random weights with the reference tokenizer, and rows of random words."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    root, rng = tmp_path_factory.mktemp("sweep"), np.random.default_rng(0)

    def text(count):
        return " ".join(rng.choice(WORDS, count)) + f" {rng.integers(10**6)}."

    data = root / "data"
    for part, count in (("train", 120), ("test", 24)):
        save(
            data / f"agnews/{part}.jsonl.gz",
            [{"text": text(9), "label": i % 4} for i in range(count)],
        )
    books = [{"title": title, "text": text(8000)} for title in ("blake-poems", "a novel")]
    save(data / "gutenberg/books.jsonl.gz", books)
    dolly = [{"context": "", "instruction": text(9), "response": text(60)} for _ in range(101)]
    save(data / "dolly15k/train.jsonl.gz", dolly)
    for part in ("train", "validation"):
        row = {"context": text(90), "title": None, "question": "Who?", "answers": {"text": ["x"]}}
        save(data / f"squad_subset/{part}.jsonl.gz", [row])
    (data / "wikitext2_valid").mkdir()
    with gzip.open(data / "wikitext2_valid/valid.txt.gz", "wt") as file:
        file.write(text(3000))
    torch.manual_seed(0)
    vocabulary = json.loads((MODEL_DIR / "config.json").read_text())["vocab_size"]
    config = OlmoeConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, tie_word_embeddings=True, max_position_embeddings=64,
        pad_token_id=None, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    OlmoeForCausalLM(config).save_pretrained(root / "base")
    shutil.copy(MODEL_DIR / "tokenizer.json", root / "base")
    return schedule.Settings(data=data, base=root / "base", out=root / "runs")


def kinds(path):
    return [json.loads(line)["kind"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"kind": "run"}\n{"kind": "end", "seconds": 1}\n', True),
        ('{"kind": "run"}\n{"kind": "round"}\n', False),
        ('{"kind": "run"}\n{"kind": "e', False),
        ("", False),
    ],
)
def test_a_run_is_finished_with_its_last_line(tmp_path, text, whole):
    path = tmp_path / "0.jsonl"
    assert not schedule.finished(path)
    path.write_text(text)
    assert schedule.finished(path) is whole


def test_a_sweep_goes_on_where_it_was_and_a_failure_ends_nothing_else(settings, tmp_path, caplog):
    here = replace(settings, out=tmp_path / "runs")
    done, cut, new, bad = (
        Task(TINY, METHODS["ours"], 0),
        Task(TINY, METHODS["linear-probe"], 0),
        Task(TINY, METHODS["fft-moe"], 0),
        Task(replace(TINY, name="crowded", clients=1000), METHODS["ours"], 0),
    )
    done.path(here.out).parent.mkdir(parents=True)
    done.path(here.out).write_text('{"kind": "end", "seconds": 1}\n')
    cut.path(here.out).parent.mkdir(parents=True)
    cut.path(here.out).write_text('{"kind": "run", "suite"')
    with caplog.at_level(logging.INFO):
        failed = schedule.run([bad, done, cut, new], here, jobs=1)
    [line] = failed
    assert line.startswith("crowded/ours/0: ValueError: ")
    assert "4 runs, 1 of them done before" in caplog.text
    assert done.path(here.out).read_text() == '{"kind": "end", "seconds": 1}\n'  # not run again
    for task in (cut, new):
        found = kinds(task.path(here.out))
        assert (found[0], found[-1], found.count("round")) == ("run", "end", 1)
    assert not bad.path(here.out).exists()
    before = {path: path.stat().st_mtime_ns for path in here.out.rglob("*.jsonl")}
    assert schedule.run([done, cut, new], here, jobs=1) == []
    assert {path: path.stat().st_mtime_ns for path in here.out.rglob("*.jsonl")} == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--suite", "agnew"], "--suite agnew: one of agnews-0.1, "),
        (["--suite", "agnews-0.1", "--method", "fedmo"], "--method fedmo: one of "),
        (
            ["--suite", "selection-15", "--method", "fedit"],
            "--method fedit: one of random, frequency, ",
        ),
        (["--suite", "agnews-0.1", "--data", "nowhere"], "--data nowhere: no such folder"),
        (["--suite", "agnews-0.1", "--base", "nowhere"], "--base nowhere: no config.json there"),
        (["--suite", "agnews-0.1", "--tuned", "none.json"], "--tuned none.json: no such file"),
        (
            ["--suite", "agnews-0.1", "--device", "nothing"],
            "--device nothing: torch cannot use it: ",
        ),
        (["--suite", "agnews-0.1", "--tune"], "--tune: --tuned FILE is wanted"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert command.main(flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.federated: ")
    assert words in line


def test_a_file_that_is_no_tuned_values_is_named(capsys, tmp_path):
    (tmp_path / "tuned.json").write_text('{"ours": 0.01}')
    flags = ["--suite", "agnews-0.1", "--tuned", str(tmp_path / "tuned.json")]
    assert command.main(flags) == 2
    assert "not a file of tuned values" in capsys.readouterr().err


def test_a_method_of_one_suite_only_is_known(tmp_path):
    flags = ["--suite", "selection-15", "--method", "frequency", "--seeds", "4"]
    [task] = command.checked(command.parser().parse_args(flags))
    assert task.name == "selection-15/frequency/4"


def test_ray_that_is_not_installed_is_one_line(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(schedule.ScheduleError, match="the package ray is not installed"):
        schedule.run([], replace(settings, out=tmp_path), ray="local")


@pytest.mark.slow
def test_every_method_runs(settings, tmp_path):
    here, two = replace(settings, out=tmp_path / "runs"), replace(TINY, rounds=2)
    every = {m.name: m for m in (*SELECTION, *ABLATIONS, *UPLINK, *METHODS.values())}
    tasks = [Task(two, method, 0) for method in every.values()]
    assert schedule.run(tasks, here, jobs=1) == []
    for task in tasks:
        assert kinds(task.path(here.out))[-1] == "end"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.filterwarnings("ignore")
def test_runs_over_ray(settings, tmp_path):
    here = replace(settings, out=tmp_path / "runs")
    good, bad = (
        Task(TINY, METHODS["ours"], 1),
        Task(replace(TINY, name="crowded", clients=1000), METHODS["ours"], 1),
    )
    [line] = schedule.run([good, bad], here, ray="local")
    assert line.startswith("crowded/ours/1: ")
    assert "rows are too few for 1000 clients" in line
    assert kinds(good.path(here.out))[-1] == "end"
    assert schedule.run([good], here, ray="local") == []

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import data
from edge.data import DataError, Prompter, Row
from protocol.messages import Task

LABELS = ("sport", "science", "finance")


def write(path, rows):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")
    with opened as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_read(tmp_path, name):
    path = write(tmp_path / name, [{"t": "a", "y": 1}, {"t": "b", "y": "x"}])
    assert data.read_rows(path, "t", "y") == [Row("a", "1"), Row("b", "x")]
    assert data.read_rows(path, "t", None) == [Row("a"), Row("b")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a", "label": "x"}\n{"text": "b"}\n', r"rows.jsonl:2: no field 'label'"),
        (b'{"text": 1.5, "label": "x"}\n', "'text' is float"),
        (b"[1]\n", "list found"),
        (b"\xff\xfe\n", "rows.jsonl:1: not a line of JSON"),
        (b'{"text": "a", "label"', "rows.jsonl:1: not a line of JSON"),
        (b"\n\n", "no rows"),
        (b"[" * 100000, "not a line of JSON"),
    ],
)
def test_unreadable_rows_are_named(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        data.read_rows(path, "text", "label")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        data.read_rows(tmp_path / "none.jsonl", "text", None)
    with pytest.raises(DataError, match="cannot be read"):
        data.read_rows(tmp_path, "text", None)
    whole = write(tmp_path / "rows.jsonl.gz", [{"text": str(i)} for i in range(500)]).read_bytes()
    for name, content in (("cut.jsonl.gz", whole[:-20]), ("plain.jsonl.gz", b"{}\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            data.read_rows(tmp_path / name, "text", None)


def test_bad_labels_name_the_nearest():
    rows = [Row("a", "sport"), Row("b", "sports")]
    with pytest.raises(DataError, match=r"row 2 has the label 'sports'; did you mean 'sport'\?"):
        data.check_labels(rows, Task(labels=LABELS), "f")
    with pytest.raises(DataError, match="name the field"):
        data.check_labels([Row("a")], Task(labels=LABELS), "f")
    data.check_labels([Row("a")], Task(), "f")


def test_the_split_is_stable_and_holds_back_a_fifth():
    rows = [Row(f"row {i}") for i in range(2000)]
    train, held = data.split_rows(rows)
    assert len(train) + len(held) == 2000
    assert 320 < len(held) < 480
    assert data.split_rows(held) == ([], held)
    assert data.first_by_hash(held, 9) == data.first_by_hash(held[::-1], 9)


def test_labels_are_their_own_words_when_they_begin_differently(tokenizer):
    found = data.verbalise(LABELS, tokenizer, 2)
    assert not found.codes
    assert [len(a) for a in found.answers] == [
        min(2, len(data.encode(tokenizer, " " + x))) for x in LABELS
    ]
    assert len(set(found.first.tolist())) == 3


def test_labels_that_begin_alike_get_codes(tokenizer):
    labels = ("play music", "play radio", "stop")
    found = data.verbalise(labels, tokenizer, 2)
    assert found.codes
    assert found == data.verbalise(labels, tokenizer, 2)
    assert len(set(found.first.tolist())) == 3
    assert all(len(a) == 1 for a in found.answers)


def test_too_many_labels_for_codes(tokenizer):
    labels = tuple(f"same {i}" for i in range(5000))
    with pytest.raises(DataError, match="5000 labels, but only"):
        data.verbalise(labels, tokenizer, 2)


def prompts(tokenizer, labels=LABELS, batch=2, sequence=24, answers=2):
    return data.prompter(tokenizer, Task(labels=labels), batch, sequence, answers)


def test_a_row_ends_in_its_answer(tokenizer):
    p = prompts(tokenizer)
    batch = p.assemble([Row("the team", "science")], None)
    tokens = [*data.encode(tokenizer, "Text: the team"), *data.encode(tokenizer, "\nTopic:")]
    answer = data.encode(tokenizer, " science")[:2]
    n = len(tokens) + len(answer)
    assert batch.tokens[0, :n].tolist() == [*tokens, *answer]
    assert batch.valid[0].tolist() == [1.0] * n + [0.0] * (24 - n)
    assert batch.positions[0, 0] == len(tokens) - 1
    assert batch.targets[0, : len(answer)].tolist() == answer
    assert batch.weights[0].tolist() == [1.0] * len(answer) + [0.0] * (2 - len(answer))
    assert batch.labels.tolist() == [1, -1]
    assert batch.valid[1].sum() == batch.weights[1].sum() == 0


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=300), label=st.sampled_from(LABELS), second=st.booleans())
def test_every_text_fits_and_targets_are_what_follows(tokenizer, text, label, second):
    p = prompts(tokenizer)
    rows = [Row("x", "sport"), Row(text, label)] if second else [Row(text, label)]
    batch = p.assemble(rows, None)
    flat = batch.tokens.reshape(-1)
    for place, target, weight in zip(
        batch.positions.reshape(-1),
        batch.targets.reshape(-1),
        batch.weights.reshape(-1),
        strict=True,
    ):
        if weight:
            assert flat[place + 1] == target
            assert batch.valid.reshape(-1)[place + 1] == 1


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=300), seed=st.none() | st.integers(0, 99))
def test_plain_text_is_scored_where_it_lies(tokenizer, text, seed):
    p = prompts(tokenizer, labels=(), answers=5)
    rng = None if seed is None else np.random.default_rng(seed)
    batch = p.assemble([Row(text)], rng)
    length = int(batch.valid[0].sum())
    assert batch.weights[0].sum() == min(5, max(0, length - 1))
    for place, target, weight in zip(
        batch.positions[0], batch.targets[0], batch.weights[0], strict=True
    ):
        if weight:
            assert batch.tokens[0, place + 1] == target
            assert place + 1 < length


def test_training_batches_pass_over_all_rows(tokenizer):
    rows = [Row(f"text {i}", "sport") for i in range(5)]
    p = prompts(tokenizer)
    batches = list(data.training_batches(p, rows, 5, np.random.default_rng(0)))
    assert len(batches) == 5
    seen = [tuple(t) for b in batches for t in b.tokens]
    assert {seen.count(t) for t in seen} == {2}
    again = list(data.training_batches(p, rows, 5, np.random.default_rng(0)))
    assert all((a.tokens == b.tokens).all() for a, b in zip(batches, again, strict=True))
    assert sum(b.valid.any(1).sum() for b in data.evaluation_batches(p, rows)) == 5


def test_a_template_that_leaves_no_room(tokenizer):
    task = Task(template="{text}" + " very long question" * 9, labels=LABELS)
    p = data.prompter(tokenizer, task, 1, 24, 2)
    with pytest.raises(DataError, match="leave no room"):
        p.assemble([Row("a", "sport")], None)


FREE = Task(template="Q: {text}\nA:", answer="text")


def test_a_free_answer_is_the_rows_own(tokenizer):
    p = Prompter(tokenizer, FREE, 2, 24, 4, None, end=7)
    prompt = [*data.encode(tokenizer, "Q: the team"), *data.encode(tokenizer, "\nA:")]
    answer = data.encode(tokenizer, " sport")
    assert len(answer) < 4
    batch = p.assemble([Row("the team", " sport ")], None)
    n = len(prompt)
    wanted = [*answer, 7]
    assert batch.tokens[0, : n + len(wanted)].tolist() == prompt + wanted
    assert batch.valid[0].sum() == n + len(wanted)
    assert batch.positions[0, : len(wanted)].tolist() == list(range(n - 1, n - 1 + len(wanted)))
    assert batch.targets[0, : len(wanted)].tolist() == wanted
    assert batch.weights[0].tolist() == [1.0] * len(wanted) + [0.0] * (4 - len(wanted))
    assert batch.labels.tolist() == [-1, -1]
    assert batch.valid[1].sum() == batch.weights[1].sum() == 0


@settings(max_examples=80, deadline=None)
@given(
    text=st.text(max_size=200),
    label=st.none() | st.text(max_size=60),
    end=st.none() | st.just(0),
    answers=st.integers(1, 6),
    seq2seq=st.booleans(),
)
def test_free_answers_are_cut_to_k_and_leave_the_question_whole(
    tokenizer, text, label, end, answers, seq2seq
):
    p = Prompter(tokenizer, FREE, 1, 24, answers, None, seq2seq, end)
    tokens, places, answer = p.row(Row(text, label), None)
    own = data.encode(tokenizer, " " + label.strip()) if label and label.strip() else []
    ending = [] if end is None else [end]
    assert answer == (own + ending)[:answers]
    assert len(tokens) <= 24
    prompt = tokens[: len(tokens) - len(ending if seq2seq else answer)]
    suffix = data.encode(tokenizer, "\nA:")
    assert prompt[-len(suffix) :] == suffix
    body = data.encode(tokenizer, "Q: " + text)
    assert prompt[: -len(suffix)] == body[: 24 - len(suffix) - len(ending if seq2seq else answer)]
    if not seq2seq:
        assert [tokens[place + 1] for place in places] == answer


def test_rows_without_the_answers_that_a_run_wants_are_named():
    data.check_labels([Row("a", "any words"), Row("b", "")], FREE, "f")
    with pytest.raises(DataError, match="f: the run wants answers, name the field"):
        data.check_labels([Row("a")], FREE, "f")


def test_the_base_ends_free_answers_and_labels_stay_as_they_were(tokenizer):
    base = SimpleNamespace(architecture="causal", config={"eos_token_id": 0})
    p = data.prompter(tokenizer, FREE, 1, 24, 3, base)
    assert p.row(Row("x", "go"), None)[2][-1] == 0
    assert not p.seq2seq
    labelled = data.prompter(tokenizer, Task(labels=LABELS), 1, 24, 2, base)
    without = data.prompter(tokenizer, Task(labels=LABELS), 1, 24, 2)
    assert labelled.row(Row("x", "sport"), None) == without.row(Row("x", "sport"), None)
    with pytest.raises(DataError, match="answers are free text, 3 labels found"):
        data.prompter(tokenizer, Task(labels=LABELS, answer="text"), 1, 24, 2)


def test_batches_of_one_label_as_far_as_they_fill_half(tokenizer):
    prompts = data.prompter(tokenizer, Task(labels=LABELS), 4, 32, 1)
    named = dict(zip("abc", LABELS, strict=True))
    rows = [Row(f"x{i}", named[letter]) for i, letter in enumerate("abaabacababa")]
    batches = list(data.by_label(prompts, rows))  # 7, 4 and 1, in the order of their names
    labels = [["abc"[x] for x in b.labels if x >= 0] for b in batches]
    assert labels == [["b"] * 4, ["a"] * 4, ["a"] * 3, ["c"]]
    assert sum(b.valid.any(1).sum() for b in batches) == len(rows)
    few = [Row(f"x{i}", label) for i, label in enumerate(LABELS)]
    assert [int((b.labels >= 0).sum()) for b in data.by_label(prompts, few)] == [3]
    plain = data.prompter(tokenizer, Task(template="{text}"), 4, 32, 1)
    assert len(list(data.by_label(plain, [Row("one two three")] * 9))) == 3

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.federated import tasks
from benchmarks.federated.tasks import TaskError
from edge import data
from edge.data import Prompter
from reference_base import MODEL_DIR

SEQUENCE, ANSWERS = 64, 8
SENTIMENT, QUOREF = "task1687_sentiment140_classification", "task002_quoref_answer_generation"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def save(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same files as the real ones, written here."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    words = "river stone market winter council engine harvest signal garden border letter".split()

    def text(count):
        return " ".join(rng.choice(words, count)) + f" {rng.integers(10**9)}."

    def news(count):
        return [{"text": text(30), "label": i % 4} for i in range(count)]

    train = news(400)
    save(root / "agnews/train.jsonl.gz", train + train[:20])
    save(root / "agnews/test.jsonl.gz", news(200))

    def squad(paragraphs):
        for number in range(paragraphs):
            context = f"first{number} {text(70)} middle{number} {text(70)} last{number}"
            for answer in (f"first{number}", f"middle{number}", f"last{number}"):
                yield {
                    "id": None,
                    "title": None,
                    "context": context,
                    "question": f"Which word is number {number} {answer}?",
                    "answers": {"text": [answer], "answer_start": [context.index(answer)]},
                }

    save(root / "squad_subset/train.jsonl.gz", list(squad(60)))
    save(root / "squad_subset/validation.jsonl.gz", list(squad(20)))

    def xsum(count):
        return [{"document": text(200), "summary": text(25)} for _ in range(count)]

    save(root / "xsum_superni/train.jsonl.gz", xsum(80))
    save(root / "xsum_superni/test.jsonl.gz", xsum(10))

    def superni(count):
        for i in range(count):
            yield {
                "task": SENTIMENT,
                "definition": "d",
                "input": text(9),
                "output": ("positive", "negative")[i % 2],
            }
            yield {
                "task": QUOREF,
                "definition": "d",
                "input": f"Passage: {text(90)} Question: who, {i}?",
                "output": "Etty.",
            }

    save(root / "superni_mix/train.jsonl.gz", list(superni(50)))
    save(root / "superni_mix/test.jsonl.gz", list(superni(10)))
    return root


def load(folder, name, tokenizer, **more):
    return tasks.load(folder, name, tokenizer, sequence=SEQUENCE, answers=ANSWERS, **more)


def shown(folder, name, tokenizer):
    return tasks.shown(folder, name, tokenizer, sequence=SEQUENCE, answers=ANSWERS)


NAMES = ["agnews", "squad", "xsum", tasks.short(SENTIMENT), tasks.short(QUOREF)]


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_disjoint_the_same_again_and_every_prompt_fits(folder, tokenizer, name):
    found = load(folder, name, tokenizer)
    assert found == load(folder, name, tokenizer)
    parts = [found.train, found.validation, found.test]
    prompts = [row.text for part in parts for row in part]
    assert len(prompts) == len(set(prompts))
    assert all(parts)
    assert len(found.groups) == len(found.train)
    prompter = Prompter(tokenizer, tasks.TASK, 1, SEQUENCE, ANSWERS, None, end=0)
    for row in found.train[:50] + found.test[:20]:
        prompt = data.encode(tokenizer, row.text)
        assert row.text.startswith("Text: ")
        assert row.text.endswith(":")
        answer = [*data.encode(tokenizer, f" {row.label}"), 0][:ANSWERS]
        assert prompter.row(row, None)[0] == prompt + answer


def test_agnews_is_balanced_and_its_labels_begin_differently(folder, tokenizer):
    found = load(folder, "agnews", tokenizer, validation=40, test=100)
    assert Counter(row.label for row in found.validation) == dict.fromkeys(tasks.AGNEWS, 10)
    assert Counter(row.label for row in found.test) == dict.fromkeys(tasks.AGNEWS, 25)
    # The rows that were there twice are there once, a tenth is nobody's.
    assert len(found.train) == 360 - len(shown(folder, "agnews", tokenizer))
    assert found.groups == tuple(row.label for row in found.train)
    firsts = [data.encode(tokenizer, " " + label)[0] for label in found.labels]
    assert len(set(firsts)) == 4
    assert found.train[0].text.endswith("\nTopic:")


@pytest.mark.parametrize("name", ["agnews", "squad", "xsum"])
def test_a_tenth_of_the_training_rows_is_for_the_base_alone(folder, tokenizer, name):
    found = load(folder, name, tokenizer)
    nobodys = {row.text for row in shown(folder, name, tokenizer)}
    clients = {row.text for row in found.train + found.validation}
    assert not nobodys & clients
    assert not nobodys & {row.text for row in found.test}
    assert 0.05 < len(nobodys) / (len(nobodys) + len(clients)) < 0.2


def test_squad_windows_hold_their_answers_at_many_places(folder, tokenizer):
    found = load(folder, "squad", tokenizer)
    places = []
    for row in found.train + found.validation + found.test:
        context, question = row.text.removeprefix("Text: ").split("\nQuestion: ")
        assert question.endswith("?\nAnswer:")
        assert row.label in context
        if row.label.startswith("middle"):  # with words enough on both sides
            places.append(context.index(row.label) / len(context))
    # A paragraph that is nobody's takes all its three rows along.
    nobodys = shown(folder, "squad", tokenizer)
    assert len(places) == 80 - len(nobodys) / 3
    assert np.ptp(places) > 0.8
    assert np.std(places) > 0.2
    # The questions about one paragraph stay together: their rows have its number.
    number = lambda row: row.text.split("number ")[1].split()[0]  # noqa: E731
    assert not {number(r) for r in found.train} & {number(r) for r in found.validation}
    assert not {number(r) for r in nobodys} & {number(r) for r in found.train + found.validation}
    assert set(found.groups) == {f"topic {i}" for i in range(8)}
    assert found.metric == "f1"


def test_answers_in_the_middle_of_words_and_longer_than_the_window(tmp_path, tokenizer):
    context = "He paid ($500) " + "and then some more " * 40
    rows = [
        {
            "context": context,
            "id": "a",
            "question": q,
            "answers": {"text": [a], "answer_start": [s]},
        }
        for q, a, s in (
            ("How much?", "500", context.index("500")),
            ("What then?", context[15:400].strip(), 15),
            ("Why " + "on earth " * 60 + "?", "some", context.index("some")),
        )
    ]
    save(tmp_path / "squad_subset/train.jsonl.gz", rows)
    save(tmp_path / "squad_subset/validation.jsonl.gz", rows[:1])
    found = tasks.load(tmp_path, "squad", tokenizer, sequence=64, answers=8)
    assert "($500)" in found.test[0].text
    assert found.train == ()  # of the test's own paragraph nothing is trained on
    elsewhere = {**rows[0], "context": "Not so, he paid"}
    save(tmp_path / "squad_subset/validation.jsonl.gz", [{**elsewhere, "context": "x y ($50"}])
    with pytest.raises(TaskError, match="squad: '500' at 10 found, a place in 8 characters"):
        tasks.load(tmp_path, "squad", tokenizer, sequence=64, answers=8)
    save(tmp_path / "squad_subset/validation.jsonl.gz", [elsewhere])
    found = tasks.load(tmp_path, "squad", tokenizer, sequence=64, answers=8)
    assert all(len(data.encode(tokenizer, row.text)) <= 56 for row in found.train)
    assert len(found.train) == 3
    assert found.train[1].text.startswith("Text: and then some more")
    assert "\nQuestion: Why on earth" in found.train[2].text
    assert " some" in found.train[2].text.split("\n")[0]


def test_superni_tasks_keep_the_end_that_matters_and_know_their_labels(folder, tokenizer):
    assert len(tasks.NAMES) == len(set(tasks.NAMES)) == 14
    sentiment = load(folder, tasks.short(SENTIMENT), tokenizer)
    assert sentiment.labels == ("negative", "positive")
    assert sentiment.metric == "accuracy"
    quoref = load(folder, tasks.short(QUOREF), tokenizer)
    assert quoref.labels == ()
    assert all("Question: who," in row.text for row in quoref.train)


def test_data_that_cannot_be_used_is_one_line(tmp_path, folder, tokenizer):
    save(tmp_path / "agnews/test.jsonl.gz", [{"text": "a", "label": 0}])
    with pytest.raises(TaskError, match=r"agnews/train.jsonl.gz: no such file; --data wants"):
        load(tmp_path, "agnews", tokenizer)
    with pytest.raises(TaskError, match=r"squad_subset/validation.jsonl.gz: no such file"):
        load(tmp_path, "squad", tokenizer)
    with pytest.raises(TaskError, match="no task 'news'; known: agnews, squad"):
        load(tmp_path, "news", tokenizer)
    (tmp_path / "agnews/train.jsonl.gz").write_text("plain")
    with pytest.raises(TaskError, match="train.jsonl.gz: not gzipped JSON lines"):
        load(tmp_path, "agnews", tokenizer)
    save(tmp_path / "agnews/train.jsonl.gz", [{"text": "a"}])
    with pytest.raises(
        TaskError, match=r"train.jsonl.gz: a row that cannot be used: KeyError\('label'\)"
    ):
        load(tmp_path, "agnews", tokenizer)
    with pytest.raises(TaskError, match=r"12 tokens hold \d of the text"):
        tasks.load(folder, "agnews", tokenizer, sequence=20, answers=8)
    with pytest.raises(TaskError, match="no such file; held-out text"):
        tasks.heldout_text(tmp_path, tokenizer)


def test_held_out_text_is_of_all_kinds_and_not_of_squad(tmp_path, folder, tokenizer):
    books = [
        {"title": f"{who}-book", "text": f"{who} wrote this line. " * 1500}
        for who in ("blake", "austen")
    ]
    save(tmp_path / "gutenberg/books.jsonl.gz", books)
    dolly = [
        {"context": "", "instruction": f"do {i}", "response": "done " * 40} for i in range(200)
    ]
    save(tmp_path / "dolly15k/train.jsonl.gz", dolly)
    (tmp_path / "squad_subset").symlink_to(folder / "squad_subset")
    (tmp_path / "wikitext2_valid").mkdir()
    with gzip.open(tmp_path / "wikitext2_valid/valid.txt.gz", "wt") as file:
        file.write("wiki words of the valid part " * 600)
    found = tasks.heldout_text(tmp_path, tokenizer, windows=10, length=16)
    assert found.shape == (10, 16)
    assert (found == tasks.heldout_text(tmp_path, tokenizer, windows=10, length=16)).all()
    texts = [tokenizer.decode(row) for row in found]
    for kind, count in (("austen", 3), ("blake", 3), ("done", 2), ("wiki", 2)):
        assert sum(kind in text for text in texts) == count
    assert not any("Question" in text for text in texts)

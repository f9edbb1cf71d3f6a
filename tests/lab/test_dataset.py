import gzip
import json

import pytest

from lab import assistant, dataset
from lab.dataset import DataError


def test_assistant_is_deterministic_distinct_and_balanced():
    rows = assistant.generate(100, 3)
    assert rows == assistant.generate(100, 3)
    assert rows != assistant.generate(100, 4)
    assert len({row.text for row in rows}) == len(rows) == 100 * len(assistant.LABELS) >= 2000
    assert len(assistant.DOMAINS) >= 6
    assert {sum(row.intent == name for row in rows) for name in assistant.LABELS} == {100}
    assert not any("{" in row.text for row in rows)


def test_no_single_word_gives_the_label_away():
    """A rule of one word per row (its rarest spread over labels) stays far from right."""
    rows = assistant.generate(160, 0)
    seen: dict[str, dict[str, int]] = {}
    for row in rows[:2000]:
        for word in set(row.text.split()):
            seen.setdefault(word, {}).setdefault(row.intent, 0)
            seen[word][row.intent] += 1

    def guess(text):
        words = [w for w in text.split() if sum(seen.get(w, {}).values()) >= 20]
        if not words:
            return ""
        best = max(words, key=lambda w: max(seen[w].values()) / sum(seen[w].values()))
        return max(seen[best], key=lambda name: seen[best][name])

    rest = rows[2000:]
    assert sum(guess(row.text) == row.intent for row in rest) / len(rest) < 0.85


def test_test_rows_are_on_no_device_and_balanced():
    rows = dataset.assistant_rows(60, 1)
    split = dataset.split(rows, 6, 200, 240, 0.5, 1)
    texts = [row.text for row in split.test]
    texts += [row.text for part in split.devices for row in part]
    assert len(texts) == len(set(texts))
    assert {sum(r.label == name for r in split.test) for name in split.labels} == {10}


def _write(path, rows):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")
    with opened as file:
        file.write("\n".join(rows))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_read_takes_named_fields_and_drops_repeats(tmp_path, name):
    rows = [json.dumps({"body": f"text  {i % 3}", "topic": i % 2}) for i in range(6)]
    _write(tmp_path / name, rows)
    found = dataset.read(tmp_path / name, "body", "topic")
    assert [(row.text, row.label) for row in found] == [
        ("text 0", "0"),
        ("text 1", "1"),
        ("text 2", "0"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "a"}'], "no field 'label'; found: text"),
        (['{"text": "a", "label": "x"}', "{"], "not JSON lines"),
        (['{"text": "a", "label": "x"}'], "1 labels"),
        (["[1]"], "found: no object"),
    ],
)
def test_bad_data_gives_one_line(tmp_path, rows, message):
    _write(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match=message) as caught:
        dataset.read(tmp_path / "d.jsonl", "text", "label")
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        dataset.read(tmp_path / "none.jsonl", "text", "label")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-9])
    with pytest.raises(DataError, match="not JSON lines|no field"):
        dataset.read(tmp_path / "cut.jsonl.gz", "text", "label")


def test_write_and_load_are_inverse(tmp_path):
    rows = dataset.assistant_rows(5, 0)
    dataset.write(tmp_path / "a" / "rows.jsonl", rows)
    assert dataset.load(tmp_path / "a" / "rows.jsonl") == rows

from contextlib import closing

from export.journal import Journal


def test_what_was_added_is_there_again(tmp_path):
    path = tmp_path / "deep" / "j"
    with closing(Journal(path, "key")) as journal:
        journal.add("0.1", {"int4": ["a", 1]})
        journal.add("0.1", {"nf4": ["b", 2]})
    with closing(Journal(path, "key")) as journal:
        assert journal.get("0.1") == {"int4": ["a", 1], "nf4": ["b", 2]}
        assert journal.get("0.2") == {}


def test_a_broken_last_line_is_cut_off(tmp_path):
    path = tmp_path / "j"
    with closing(Journal(path, "key")) as journal:
        journal.add("0.1", {"x": 1})
        journal.add("0.2", {"x": 2})
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with closing(Journal(path, "key")) as journal:
        assert journal.get("0.1") == {"x": 1}
        assert journal.get("0.2") == {}
        journal.add("0.2", {"x": 2})
    assert path.read_bytes() == whole


def test_every_prefix_of_a_journal_can_be_read(tmp_path):
    path = tmp_path / "j"
    with closing(Journal(path, "key")) as journal:
        journal.add("0.1", {"x": 1})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with closing(Journal(path, "key")) as journal:
            assert journal.get("0.1") == {}
            journal.add("0.1", {"x": 1})
        assert path.read_bytes() == whole


def test_another_key_stays_until_something_is_added(tmp_path):
    path = tmp_path / "j"
    with closing(Journal(path, "one")) as journal:
        journal.add("0.1", {"x": 1})
    with closing(Journal(path, "two")) as journal:
        assert journal.get("0.1") == {}
    with closing(Journal(path, "one")) as journal:
        assert journal.get("0.1") == {"x": 1}
    with closing(Journal(path, "two")) as journal:
        journal.add("0.2", {"x": 2})
    with closing(Journal(path, "one")) as journal:
        assert journal.get("0.1") == {}

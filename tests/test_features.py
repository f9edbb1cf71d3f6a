"""docs/features.md names what exists: every feature once, every module, function and test that it points to."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
# `path`, `path: name`, `path: Class.name` or `path::test`; a path has a folder and an ending.
POINTER = re.compile(r"`((?:\w+/)+\w+\.(?:py|cpp))(?:: (\w+(?:\.\w+)?)|::(\w+))?`")


@functools.cache
def names(path: Path) -> frozenset[str]:
    """What a module defines at its top level, and the methods of its classes as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return frozenset(found)


def rows(letter: str) -> dict[str, list[str]]:
    """Id -> cells of its row."""
    lines = re.findall(rf"^\| ({letter}\d\d?) \|(.*)\|$", TEXT, re.MULTILINE)
    assert len({name for name, _ in lines}) == len(lines)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in lines}


def missing(text: str) -> list[str]:
    """Pointers of a text to nothing."""
    lost = []
    for path, name, test in POINTER.findall(text):
        file = ROOT / path
        wanted = name or test
        if not file.is_file() or (wanted and wanted not in names(file)):
            lost.append(f"{path} {wanted}".strip())
    return lost


def test_everything_that_is_named_exists():
    assert len(POINTER.findall(TEXT)) > 200
    assert missing(TEXT) == []


def test_every_path_is_read_as_a_pointer():
    paths = re.findall(r"`[^`]*\.(?:py|cpp)\b[^`]*`", TEXT)
    assert [p for p in paths if not POINTER.fullmatch(p) and p != "`tests/test_features.py`"] == []


def test_every_feature_has_its_row_with_module_and_test():
    found = rows("F")
    assert list(found) == [f"F{i:02}" for i in range(1, 50)]
    for name, cells in found.items():
        _, papers, modules, tests, done = cells
        assert re.search(r"\d{4}\.\d{5}|all three", papers), name
        assert POINTER.search(modules), name
        assert "::" not in modules, name
        assert any(test for _, _, test in POINTER.findall(tests)), name
        assert done, name


def test_gaps_and_defects_are_all_there():
    assert list(rows("G")) == [f"G{i:02}" for i in range(1, 25)]
    assert all(cells[-1].startswith(("Yes", "Partly", "No")) for cells in rows("G").values())
    assert list(rows("D")) == [f"D{i}" for i in range(1, 13)]
    assert all("::" in cells[-1] for cells in rows("D").values())


def test_a_pointer_to_nothing_is_seen():
    assert missing("`server/rules.py: Rules` `tests/test_arrows.py::test_arrows`") == []
    assert missing(
        "`server/rules.py: Rulez`, `server/none.py`, `tests/test_arrows.py::test_x`"
    ) == [
        "server/rules.py Rulez",
        "server/none.py",
        "tests/test_arrows.py test_x",
    ]
    assert missing("`benchmarks/federated/simulate.py: Run.predicted`") == []
    assert missing("`benchmarks/federated/simulate.py: Run.nothing`") == [
        "benchmarks/federated/simulate.py Run.nothing"
    ]

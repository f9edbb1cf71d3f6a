from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import schema
from protocol.schema import SchemaError


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str


@dataclass(frozen=True, kw_only=True)
class Outer:
    whole: int
    part: float
    flag: bool
    choice: Literal["a", "b"]
    inner: Inner
    many: tuple[Inner, ...]
    table: dict[str, tuple[int, ...]]
    free: Any
    maybe: int | None = None


GOOD = {
    "whole": 1, "part": 2, "flag": True, "choice": "a", "inner": {"name": "x"}, "many": [{"name": "y"}],
    "table": {"k": [1, 2]}, "free": [None],
}  # fmt: skip
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=8,
)


def test_there_and_back():
    value = schema.from_dict(Outer, GOOD, "t")
    assert value.part == 2.0
    assert value.many == (Inner(name="y"),)
    assert value.maybe is None
    assert schema.from_dict(Outer, schema.to_dict(value), "t") == value


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"whole": True}, "t: whole: bool found, int wanted"),
        ({"whole": 1.5}, "t: whole: float found, int wanted"),
        ({"part": float("nan")}, "t: part: nan found, a finite number wanted"),
        ({"part": 10**400}, "t: part: number out of range"),
        ({"flag": 1}, "t: flag: int found, bool wanted"),
        ({"choice": "c"}, "t: choice: 'c' found, one of a, b wanted"),
        ({"choice": []}, r"t: choice: \[\] found"),
        ({"inner": {"nam": "x"}}, "t: inner: unknown key 'nam', did you mean 'name'?"),
        ({"many": {"name": "y"}}, "t: many: dict found, list wanted"),
        ({"many": [3]}, r"t: many\[0\]: int found, table wanted"),
        ({"table": {"k": ["x"]}}, r"t: table.k\[0\]: str found, int wanted"),
        ({"hole": 1}, "t: unknown key 'hole', did you mean 'whole'?"),
    ],
)
def test_one_line_says_what_and_where(change, line):
    with pytest.raises(SchemaError, match=line):
        schema.from_dict(Outer, {**GOOD, **change}, "t")


def test_a_missing_key():
    with pytest.raises(SchemaError, match="t: key 'whole' is missing"):
        schema.from_dict(Outer, {k: v for k, v in GOOD.items() if k != "whole"}, "t")


@given(anything)
def test_anything_is_read_or_refused(value):
    with pytest.raises(SchemaError):
        schema.from_dict(Outer, value, "t")


@given(st.sampled_from(sorted(GOOD)), anything)
def test_anything_in_any_place_is_read_or_refused(key, value):
    line = ""
    try:
        schema.from_dict(Outer, {**GOOD, key: value}, "t")
    except SchemaError as error:
        line = str(error)
    assert not line or line.startswith(f"t: {key}")

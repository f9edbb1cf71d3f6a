import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["fit", "tasks", "partitions", "metrics"])
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"benchmarks.federated.{name}"))
    assert found.attempted > 0
    assert found.failed == 0

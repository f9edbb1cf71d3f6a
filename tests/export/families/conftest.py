"""Tiny sliced bases, once per session."""

import pytest

from tests.export.families import setting, tiny


@pytest.fixture(scope="session")
def sliced(tmp_path_factory):
    """Family -> (index, store, checkpoint directory), made when first asked for."""
    made = {}

    def get(model_type):
        if model_type not in made:
            root = tmp_path_factory.mktemp(model_type)
            made[model_type] = (*setting.sliced(model_type, root), root / "checkpoint")
        return made[model_type]

    return get


@pytest.fixture(params=list(tiny.CONFIGS))
def base(request, sliced):
    """(index, store, checkpoint directory) of every family in turn."""
    return sliced(request.param)

from pathlib import Path

import pytest

from lab import scenario
from lab.run import DEMO
from lab.scenario import ScenarioError

GOOD = """
name = "t"
[[device]]
name = "a"
profile = "pixel_8"
scale_budget = 0.5
[[device]]
name = "b"
profile = "pixel_8"
scale_budget = 0.5
"""


def test_the_demo_has_six_devices_of_at_least_four_profiles_and_five_rounds():
    demo = scenario.load(DEMO)
    assert len(demo.device) == 6
    assert len(demo.profiles) >= 4
    assert demo.server.rounds >= 5


def test_good_scenario_is_read_with_defaults():
    found = scenario.parse(GOOD, "t.toml")
    assert found.profiles == {"pixel_8": 0.5}
    assert found.server.aggregate == "svd"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"pixel_8"', '"pixel_9"', "did you mean 'pixel_8'"),
        ("scale_budget", "scale_budgt", "did you mean 'scale_budget'"),
        ('"b"', '"a"', "named twice"),
        ('"b"', '"b c"', "wanted in a name"),
        ("0.5\n[[", "0.6\n[[", "as for the other devices"),
        ('name = "t"', 'name = "t"\nserver.rounds = 0', "rounds 0 found"),
        ('name = "t"', 'name = "t"\nserver.min_updates = 3', "at most 2 devices"),
        ('name = "t"', 'name = "t"\ndata.alpha = 0.0', "alpha 0.0 found"),
        ('name = "t"', "name = t", "not TOML"),
    ],
)
def test_mistakes_give_one_line_with_the_file(old, new, message):
    with pytest.raises(ScenarioError, match=message) as caught:
        scenario.parse(GOOD.replace(old, new, 1), "t.toml")
    assert str(caught.value).startswith("t.toml:")
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(ScenarioError, match="no such file"):
        scenario.load(Path("nowhere.toml"))

"""Profiles: what ships is complete, what is wrong is refused in one line."""

from pathlib import Path

import pytest

import device_profiles
from device_profiles import ProfileError, load, names

WANTED = {
    "jetson_orin",
    "jetson_orin_nano",
    "pixel_8",
    "galaxy_s24",
    "raspberry_pi_5",
    "phone_4gb",
}
SHIPPED = Path(device_profiles.__file__).parent
FIGURES = (
    "memory_mb",
    "budget_mb",
    "flash_mb",
    "flash_budget_mb",
    "gflops",
    "memory_gb_s",
    "downlink_mbit",
    "uplink_mbit",
    "uplink_mb",
    "deadline_s",
)


def written(tmp_path, **changes):
    """The Pixel 8 profile with some lines replaced; None removes a line."""
    lines = (SHIPPED / "pixel_8.toml").read_text().splitlines()
    kept = [line for line in lines if line.split(" = ")[0] not in changes]
    new = [f"{key} = {value}" for key, value in changes.items() if value is not None]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(new + kept))
    return path


def test_the_six_profiles_ship():
    assert set(names()) >= WANTED


@pytest.mark.parametrize("name", names())
def test_shipped_profile(name):
    profile = load(name)
    assert profile.name == name
    assert profile.budget_mb < profile.memory_mb
    text = " ".join(profile.sources)
    assert all(figure in text for figure in FIGURES), "every figure has its source"
    opening = (SHIPPED / f"{name}.toml").read_text().splitlines()[:2]
    assert opening[1] == f"# python -m export.build --profile {name} --out STORE"


def test_all_shipped_profiles_share_one_rank():
    # The server keeps one adapter, of one rank.
    assert len({load(name).rank for name in names()}) == 1


def test_budget_in_bytes():
    assert load("phone_4gb").budget_bytes == 512 * 2**20


def test_a_profile_may_be_any_file(tmp_path):
    profile = load(written(tmp_path, name='"mine"', budget_mb=7))
    assert (profile.name, profile.budget_mb) == ("mine", 7)


def test_unknown_profile_names_the_nearest():
    with pytest.raises(ProfileError, match=r"unknown profile 'jetson_orim', did you mean 'jetson_"):
        load("jetson_orim")


def test_unknown_profile_far_from_all_lists_them():
    with pytest.raises(ProfileError, match="known: galaxy_s24, jetson_orin, "):
        load("xyzzy")


def test_missing_file():
    with pytest.raises(ProfileError, match=r"nowhere/mine\.toml: no such file"):
        load("nowhere/mine.toml")


def test_a_folder_is_no_profile(tmp_path):
    with pytest.raises(ProfileError, match="directory"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memroy_mb": 1}, r"mine\.toml: unknown key 'memroy_mb', did you mean 'memory_mb'\?"),
        ({"rank": None}, r"mine\.toml: key 'rank' is missing"),
        ({"rank": '"8"'}, r"mine\.toml: rank: str found, int wanted"),
        ({"rank": 0}, r"mine\.toml: rank 0 found, more than 0 wanted"),
        ({"gflops": "nan"}, r"mine\.toml: gflops: nan found, a finite number wanted"),
        ({"budget_mb": 8193}, r"mine\.toml: budget_mb 8193 found, at most memory_mb 8192 wanted"),
        (
            {"flash_budget_mb": 200000},
            r"mine\.toml: flash_budget_mb 200000 found, at most flash_mb",
        ),
        ({"deadline_s": None}, r"mine\.toml: key 'deadline_s' is missing"),
        ({"backend": '"tflite"'}, r"mine\.toml: backend: 'tflite' found, one of executorch"),
        ({"rank": ""}, r"mine\.toml: not TOML: "),
    ],
)
def test_bad_profile_is_one_line(tmp_path, changes, message):
    with pytest.raises(ProfileError, match=message) as caught:
        load(written(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="not TOML"):
        load(path)

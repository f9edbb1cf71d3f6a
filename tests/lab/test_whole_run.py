"""The lab from the checkpoint to the report, with the real builder, server, broker and devices."""

import pytest

import reference_base
from lab import history, run

SCENARIO = """
name = "two"
[artifact]
rank = 4
tokens = 128
[server]
rounds = 2
steps = 2
min_updates = 2
[data]
rows_per_device = 60
held_back = 16
test_rows = 24
[[device]]
name = "large"
profile = "jetson_orin"
scale_budget = 0.002
[[device]]
name = "small"
profile = "phone_4gb"
scale_budget = 0.05
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (reference_base.MODEL_DIR / "tokenizer.json").exists(),
    reason="the reference base is not in this checkout",
)
def test_two_devices_of_different_slots(tmp_path, capsys):
    scenario = tmp_path / "two.toml"
    scenario.write_text(SCENARIO)
    out = tmp_path / "out"
    code = run.main(
        ["--scenario", str(scenario), "--out", str(out), "--cache", str(tmp_path / "cache")]
    )
    said = capsys.readouterr()
    assert code == 0, said.err + said.out
    assert "within budget: 2 of 2" in said.out
    assert "export.verify_adapter: ok" in said.out
    assert (out / "report.html").is_file()
    lines = history.parse((out / "state" / "history.jsonl").read_text(), "history")
    assert [entry["work"] for entry in lines] == ["profile", "train", "train", "evaluate"]
    for entry in lines[1:3]:
        assert set(entry["devices"]) == {"large", "small"}
    large, small = (lines[1]["devices"][name] for name in ("large", "small"))
    assert sum(map(len, small["resident"].values())) < sum(map(len, large["resident"].values()))
    # A fleet of two ranks: the smaller device's updates are smaller by more than its missing experts.
    assert small["bytes_up"] < large["bytes_up"]

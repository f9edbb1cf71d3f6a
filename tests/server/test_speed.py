import json
import urllib.request

import pytest

from device_profiles import measure
from server import speed
from tests.server.fake_device import http_error


def test_the_link_to_a_real_server_is_measured(serve, monkeypatch):
    monkeypatch.setattr(measure, "LINK_SECONDS", 0.02)
    down, up = measure.link_mbit(serve().url)
    assert down > 1
    assert up > 1


def test_bytes_either_way_and_limits(serve, monkeypatch):
    url = serve().url + "/v1/link"
    with urllib.request.urlopen(f"{url}?bytes=300001") as response:
        assert len(response.read()) == 300001
    with urllib.request.urlopen(url, data=b"x" * 70000) as response:
        assert json.loads(response.read()) == {"bytes": 70000}
    for wrong in ("0", "x", "-1", str(speed.MOST + 1), "9" * 5000, "٣"):
        quoted = urllib.request.quote(wrong)
        code, text = http_error(lambda q=quoted: urllib.request.urlopen(f"{url}?bytes={q}"))
        assert code == 400
        assert "wanted" in text


def test_a_slow_link_is_measured_by_time():
    spent = []
    with pytest.MonkeyPatch.context() as patch:
        clock = iter([0.0, 1.0, 1.0, 5.0])
        patch.setattr(measure.time, "perf_counter", lambda: next(clock))
        rate = measure._rate(spent.append)
    # 256 KB took one second, which is too short; four times as much took four.
    assert spent == [1, 256 << 10, 1 << 20]
    assert rate == pytest.approx((1 << 20) * 8 / 4 / 1e6)

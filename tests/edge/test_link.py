"""The device's MQTT side against real brokers that are killed and come back."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edge.link import Connected, Link, LinkError
from protocol import messages, topics

ROOT = Path(__file__).parents[2]
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


def commands(port, folder):
    conf = folder / "mosquitto.conf"
    conf.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    return {
        "mosquitto": [MOSQUITTO, "-c", str(conf)],
        "amqtt": [sys.executable, "-m", "server.amqtt_process", "127.0.0.1", str(port)],
    }


@pytest.fixture(params=["mosquitto", "amqtt"])
def broker(request, tmp_path):
    if request.param == "mosquitto" and MOSQUITTO is None:
        pytest.skip("no mosquitto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []

    def start():
        children.append(
            subprocess.Popen(
                commands(port, tmp_path)[request.param],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        )
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("the broker does not listen")

    def stop():
        children[-1].kill()
        children[-1].wait()

    start()
    yield f"mqtt://127.0.0.1:{port}", port, start, stop
    stop()


def server_side(port):
    """A client that hears what devices say, and can speak to them."""
    heard = []
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="server")
    client.on_connect = lambda c, *_: c.subscribe([(t, 1) for t in topics.server_filters("home")])
    client.on_message = lambda _, __, m: heard.append((m.topic, bytes(m.payload)))
    client.reconnect_delay_set(1, 2)
    client.connect_async("127.0.0.1", port)
    client.loop_start()
    return client, heard


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def until_event(link, kind, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if isinstance(event := link.next_event(0.1), kind):
            return event
    raise AssertionError(f"no {kind.__name__}")


def states(heard):
    return [
        messages.expect(messages.Status, data).state
        for topic, data in heard
        if topic.endswith("/status")
    ]


def test_a_broker_that_restarts_is_ridden_out(broker):
    url, port, start, stop = broker
    client, heard = server_side(port)
    try:
        with Link(url, "home", "pixel-1") as link:
            until_event(link, Connected)
            until(lambda: states(heard) == ["online"], heard)
            link.say(messages.Ready(device="pixel-1", run="r"))
            link.send_chunk("x1", 3, b"abc")
            until(lambda: ("fl/v1/home/pixel-1/up/x1/3", b"abc") in heard, heard)
            until(lambda: link.sent() == [("x1", 3)], "no PUBACK")
            stop()
            until(lambda: link.lost_for() > 0, "not noticed")
            link.say(messages.Ready(device="pixel-1", run="r"))  # nowhere: dropped, not queued
            start()
            until_event(link, Connected)
            assert link.lost_for() == 0
            over = messages.encode(messages.RunOver(run="r"))

            def told():
                client.publish(topics.down_ctl("home", "pixel-1"), b"{nonsense", qos=1)
                client.publish(topics.down_ctl("home", "pixel-1"), over, qos=1)
                return isinstance(link.next_event(0.5), messages.RunOver)

            until(told, "not told")
        until(lambda: states(heard)[-1] == "offline", heard)
    finally:
        client.disconnect()
        client.loop_stop()


def test_a_device_that_dies_is_reported_by_its_last_will(broker):
    url, port, _, _ = broker
    client, heard = server_side(port)
    code = f"""
import time
from edge.link import Link
with Link({url!r}, "home", "pixel-1") as link:
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        until(lambda: "online" in states(heard), heard)
        child.kill()
        until(lambda: states(heard)[-1] == "offline", heard)
    finally:
        child.kill()
        child.wait()
        client.disconnect()
        client.loop_stop()


@pytest.mark.parametrize("url", ["http://h:1", "mqtt://", "mqtt://h:99999", "localhost"])
def test_an_address_that_is_none(url):
    with pytest.raises(LinkError, match="broker"), Link(url, "home", "a"):
        pass

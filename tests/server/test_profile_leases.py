"""What a profiling round's leases say of the whole model, and the flags behind it. By hand."""

import dataclasses

import numpy as np
import pytest

from protocol import names, tensors
from server import adapters, config, leases
from server.rounds import OpenRound
from tests.server import tiny_store

TERMS = leases.Terms(
    run="r", steps=3, learning_rate=0.1, router_learning_rate=0.01, deadline=60.0, seed=0,
    exploration=0.0, coverage=0.0, profile="full", profile_rows=9, profile_clip=16.0,
    profile_noise=0.5, strategy="coverage", uplink_bytes=0,
)  # fmt: skip


def made(folder, *, version, work="profile", terms=TERMS):
    """The leases of two devices whose slots have ranks 2 and 1."""
    base = tiny_store.base_index()
    slots = {"a": "int8/2 int4/1", "b": "int4/1 int4/1"}
    parse = lambda text: tuple(  # noqa: E731
        tiny_store.Slot(format=f, rank=int(r)) for f, r in (s.split("/") for s in text.split())
    )
    shapes = {d: tiny_store.shape((parse(s),) * len(base.moe_layers)) for d, s in slots.items()}
    adapter = adapters.fresh(base, 2)
    rng = np.random.default_rng(0)
    adapter = {n: rng.random(v.shape, np.float32) for n, v in adapter.items()}
    adapters.write_version(folder / "adapters", version, adapter, {})
    found = leases.write_leases(
        OpenRound(round=0, work=work, devices=tuple(slots)),
        {device: [[0, 1]] * len(base.moe_layers) for device in slots},
        shapes, {}, base=base, terms=terms, version=version,
        adapter_folder=folder / "adapters", blob_folder=folder / "blobs",
    )  # fmt: skip
    return found, adapter, base, folder / "blobs"


def test_a_later_profile_gets_the_adapter_of_every_expert(tmp_path):
    found, adapter, base, blobs = made(tmp_path, version=1)
    for device, rank in (("a", 2), ("b", 1)):
        lease = found[device]
        said = (lease.profile, lease.profile_rows, lease.profile_clip, lease.profile_noise)
        assert said == ("full", 9, 16.0, 0.5)
        whole = tensors.decode((blobs / lease.profile_adapter.sha256).read_bytes())
        assert whole.keys() == adapter.keys()
        last = names.lora(base.moe_layers[-1], base.num_experts - 1, "down", "lora_B")
        np.testing.assert_array_equal(whole[last], adapter[last][:, :rank])


def test_the_first_profile_is_of_the_base(tmp_path):
    found, *_ = made(tmp_path, version=0)
    assert found["a"].profile == "full"
    assert found["a"].profile_adapter is None


@pytest.mark.parametrize(
    ("work", "profile"), [("train", "full"), ("evaluate", "full"), ("profile", "resident")]
)
def test_no_other_lease_speaks_of_it(tmp_path, work, profile):
    terms = dataclasses.replace(TERMS, profile=profile)
    found, *_ = made(tmp_path, version=1, work=work, terms=terms)
    assert found["a"].profile == "resident"
    assert (found["a"].profile_clip, found["a"].profile_adapter) == (0.0, None)


def test_flags(tmp_path):
    needed = ["--store", str(tmp_path), "--state", str(tmp_path)]
    assert config.parse(needed).profile == "resident"
    full = [*needed, "--profile", "full"]
    found = config.parse(
        [*full, "--profile-rows", "64", "--profile-clip", "32", "--profile-noise", "1"]
    )
    assert (found.profile_rows, found.profile_clip, found.profile_noise) == (64, 32.0, 1.0)
    for flags, words in (
        ([*full, "--profile-noise", "1"], "--profile-noise wants --profile-clip"),
        ([*full, "--profile-rows", "-1"], "--profile-rows -1 found, 0 to"),
        ([*needed, "--profile-clip", "1"], "are for --profile full"),
    ):
        with pytest.raises(config.ConfigError, match=words):
            config.parse(flags)

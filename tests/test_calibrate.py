"""Hardware profiles: kept, read again, refused when damaged; and measured by the command."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from cptool.errors import UserError
from cptool.hardware import default_profile, load_profile, profile_path, save_profile


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))


def test_without_a_file_the_default():
    assert load_profile("cpu") == default_profile("cpu")


def test_what_is_saved_is_loaded_beside_other_devices():
    cpu = dataclasses.replace(default_profile("cpu"), link_bandwidth=3e9, rule=(0.5, -1.0, 2.0))
    cuda = dataclasses.replace(default_profile("cuda"), name="measured")
    save_profile(cpu)
    assert load_profile("cuda") == default_profile("cuda")
    save_profile(cuda)
    assert (load_profile("cpu"), load_profile("cuda")) == (cpu, cuda)


def test_a_damaged_file_is_told_in_one_line():
    good = dataclasses.asdict(default_profile("cpu"))
    damages = [
        "not json",
        "[]",
        "{}",
        json.dumps({"format": 99, "devices": {}}),
        json.dumps({"format": 1, "devices": {"cpu": {**good, "link_bandwidth": 0}}}),
        json.dumps({"format": 1, "devices": {"cpu": {**good, "link_latency_s": -1}}}),
        json.dumps({"format": 1, "devices": {"cpu": {**good, "memory_bandwidth": "fast"}}}),
        json.dumps({"format": 1, "devices": {"cpu": {**good, "rule": [1, 2]}}}),
        json.dumps({"format": 1, "devices": {"cpu": {"name": "x"}}}),
    ]
    profile_path().parent.mkdir(parents=True)
    for damage in damages:
        profile_path().write_text(damage)
        with pytest.raises(UserError, match="cptool bench calibrate") as error:
            load_profile("cpu")
        assert "\n" not in str(error.value)


def test_rates_follow_the_threads_of_a_rank():
    profile = dataclasses.replace(default_profile("cpu"), threads=2)
    other = profile.for_ranks(threads=4, processors=16)
    assert other.linear_flops["float32"] == 2 * profile.linear_flops["float32"]
    assert (other.ranks_at_once, other.threads) == (4, 4)
    assert default_profile("cuda").for_ranks(8, 16) == default_profile("cuda")


@pytest.mark.parametrize("ranks", [1, 2])
def test_calibrate_writes_a_profile(ranks):
    command = [sys.executable, "-m", "cptool", "bench", "calibrate", "--cp", str(ranks)]
    command += ["--threads", "1", "--device", "cpu", "--dtype", "bfloat16", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    profile, default = load_profile("cpu"), default_profile("cpu")
    assert said["path"] == str(profile_path()) and said["name"] == profile.name
    assert profile.threads == 1 and len(profile.rule) == 3
    assert (profile.link_bandwidth == default.link_bandwidth) == (ranks == 1)

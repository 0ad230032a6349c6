"""Hardware profiles: kept, read again, refused when damaged; and measured by the command."""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from json_document import PAGE, Document
from test_json_fields import CALIBRATED, EVERY

from cptool import calibration
from cptool.calibration import clock
from cptool.cli.main import main
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.distributed.status_board import Board
from cptool.distributed.world import World
from cptool.errors import UserError
from cptool.host import processor
from cptool.ops.processor import has_bfloat16_products
from cptool.planning.hardware import MEASURED, Measurement
from cptool.planning.profiles import (
    FORMAT,
    default_profile,
    find_profile,
    known_profiles,
    load_profile,
    profile_path,
    save_profile,
)
from cptool.variants import names


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))


def test_without_a_file_the_default():
    assert load_profile("cpu") == default_profile("cpu")


def test_what_is_saved_is_loaded_beside_other_devices():
    cpu = dataclasses.replace(default_profile("cpu"), memory_bandwidth=3e9, rule=(0.5, -1.0, 2.0))
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
        json.dumps({"format": 1, "devices": {"cpu": good}}),
        *(
            json.dumps({"format": FORMAT, "devices": {"cpu": fields}})
            for fields in (
                {**good, "host_link": {**good["host_link"], "bandwidth": 0}},
                {**good, "host_link": {**good["host_link"], "latency_s": -1}},
                {**good, "network": {}},
                {**good, "memory_bandwidth": "fast"},
                {**good, "rule": [1, 2]},
                {"name": "x"},
            )
        ),
    ]
    profile_path().parent.mkdir(parents=True)
    for damage in damages:
        profile_path().write_text(damage)
        with pytest.raises(UserError, match="cptool bench calibrate") as error:
            load_profile("cpu")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", known_profiles())
def test_profiles_by_name_explain_themselves(name):
    profile = find_profile(name)
    assert profile.name == name and profile.notes["source"]
    assert set(profile.notes) - {"source"} <= {f.name for f in dataclasses.fields(profile)}


def test_a_profile_may_be_a_file(tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**dataclasses.asdict(find_profile("a100")), "memory_bytes": 40e9}))
    assert find_profile(str(own)).memory_bytes == 40e9
    for name, reason in (("h1000", "name one of a100"), ("measured", "calibrate")):
        with pytest.raises(UserError, match=reason):
            find_profile(name)
    own.write_text('{"name": 1}')
    with pytest.raises(UserError, match="is not a hardware profile"):
        find_profile(str(own))
    save_profile(find_profile("cpu-avx2"))
    assert find_profile("measured") == find_profile("cpu-avx2")


def test_rates_follow_the_threads_of_a_rank():
    profile = dataclasses.replace(default_profile("cpu"), threads=2)
    other = profile.for_ranks(threads=4, processors=16)
    assert other.linear_flops["float32"] == 2 * profile.linear_flops["float32"]
    assert (other.ranks_at_once, other.threads) == (4, 4)
    assert default_profile("cuda").for_ranks(8, 16) == default_profile("cuda")


@pytest.mark.parametrize("ranks", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_calibrate_writes_a_profile(ranks, monkeypatch):
    command = ["bench", "calibrate", *(["--cp", str(ranks)] if ranks else [])]
    command += ["--threads", "1", "--device", "cpu", "--dtype", "float32", "--json"]
    if ranks == 1:  # in this process, where each measurement can be made once
        begin = clock.Clock.__init__

        logs = []

        def once(self, world, part, repeats, log):
            begin(self, world, part, 1, log)
            logs.append(log)

        monkeypatch.setattr(clock.Clock, "__init__", once)
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
        assert logs[0].begun == logs[0].total  # the bar ends full
    else:
        command = [sys.executable, "-m", "cptool", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    document = Document(PAGE.read_text())
    assert document.check(said, EVERY, "cptool bench calibrate") == []
    assert not CALIBRATED & {heading for heading, _ in document.unprinted()}
    profile, default = load_profile("cpu"), default_profile("cpu")
    assert said["path"] == str(profile_path()) and said["name"] == profile.name
    assert profile.threads == 1 and len(profile.rule) == 3
    # Each rank is bound to its share of the processors; all of them serve the ranks.
    assert profile.ranks_at_once == len(os.sched_getaffinity(0))
    assert set(profile.residual_s) == (set() if ranks else {"2", "4"})
    assert (profile.host_link == default.host_link) == (ranks == 1)
    assert [found.ranks for found in profile.row_rates["float32"]] == ([1] if ranks else [1, 2])


def more_ranks(world, residuals):
    """What is found on top of each of `residuals` where every run takes 1 s a layer."""
    clock.Clock.all = lambda self, works, **_: {w: float(w.split()[-1]) for w in works}
    profile = default_profile("cpu")
    return [
        calibration.measure_more_ranks(
            world, ("float32",), dataclasses.replace(profile, residual_s=found), repeats=0
        ).residual_s["2"]
        for found in residuals
    ]


def test_what_was_found_on_fewer_ranks_is_not_counted_again():
    found = {}, {"3": {variant: (5.0, 7.0) for variant in names(baselines=True)}}
    bare, again = run(more_ranks, found, ranks=RankOptions(cp=2, device="cpu", threads=1))
    assert bare == again and all(0.9 < each < 1 for pair in bare.values() for each in pair)


def calibrated(monkeypatch, *options, load, spread, code=0):
    """What the command prints where measuring gives the default profile."""

    def measure(world, dtypes, *, load):
        found = Measurement(
            date="2026-11-30", machine="a CPU", load=load, spread=spread, dtypes=dtypes
        )
        return dataclasses.replace(default_profile("cpu"), rule=(1, 1, 1), measurement=found)

    monkeypatch.setattr(calibration, "measure", measure)
    monkeypatch.setattr(processor, "load_per_processor", lambda: load)
    command = ["bench", "calibrate", "--cp", "1", "--device", "cpu", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == code, done.output
    return done


def test_a_dtype_that_was_not_measured_has_no_ceiling():
    """Else a run in a type that the first one is slow in would be told that it computed nothing."""
    measured = Measurement(date="2026-11-30", dtypes=("bfloat16",))
    named = {"name": MEASURED + "2 cpu ranks", "measurement": measured}
    profile = dataclasses.replace(default_profile("cpu"), **named)
    assert profile.ceiling("bfloat16") and profile.ceiling("float32") is None


def test_rough_figures_do_not_replace_better_ones(monkeypatch):
    quiet = calibrated(monkeypatch, load=0.02, spread=0.04)
    assert "2026-11-30 on a CPU: the load was 0.02 per processor" in quiet.stdout
    assert not quiet.stderr
    kept = load_profile("cpu").measurement
    assert (kept.load, kept.spread) == (0.02, 0.04)
    first = "bfloat16" if has_bfloat16_products() else "float32"  # what models compute in
    assert kept.dtypes[0] == first and set(kept.dtypes) == {"bfloat16", "float32"}
    told = calibrated(monkeypatch, load=1.9, spread=0.04, code=2).stderr
    assert told.count("\n") == 1 and "the load is 1.9 per processor" in told and "--force" in told
    told = calibrated(monkeypatch, "--json", load=0.1, spread=0.5, code=1)
    assert json.loads(told.stdout)["kept"] is False
    assert "repeats of a measurement differ by 50%" in told.stderr
    assert load_profile("cpu").measurement == kept
    told = calibrated(monkeypatch, "--force", load=1.9, spread=0.5).stderr
    assert "these figures are rough" in told
    assert load_profile("cpu").measurement.load == 1.9
    calibrated(monkeypatch, load=1.0, spread=0.5)  # no worse than what is kept


def test_a_profile_without_a_date_is_as_old_as_its_file():
    save_profile(default_profile("cpu"))
    assert load_profile("cpu").source == f"calibrated {datetime.date.today().isoformat()}"


def test_the_spread_is_that_of_the_middle_half():
    assert clock.spread_of([1.0, 1.0, 1.0, 1.0, 9.0]) == 0
    assert clock.spread_of([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_a_profile_with_stored_weights_is_saved_and_loaded():
    kept = dataclasses.replace(default_profile("cpu"), tokenwise_bandwidth={"float32": 7e9})
    assert kept.stored is not None
    save_profile(kept)
    assert load_profile("cpu") == kept
    twice = kept.scaled(2)
    assert twice.tokenwise_bandwidth == {"float32": 14e9}
    assert (twice.stored.direct, twice.stored.layer_s) == (
        2 * kept.stored.direct,
        kept.stored.layer_s,
    )
    damaged = dataclasses.asdict(kept)
    damaged["stored"]["direct"] = 0
    profile_path().write_text(json.dumps({"format": FORMAT, "devices": {"cpu": damaged}}))
    with pytest.raises(UserError, match="cptool bench calibrate"):
        load_profile("cpu")


def test_a_compute_clock_leaves_out_what_others_had(monkeypatch):
    """Never less than the thread itself computed."""
    world = World(device=torch.device("cpu"), board=Board(1))
    monkeypatch.setattr(clock.contention, "waits", dict)
    for waited, all_of_it in ((0.0, True), (100.0, False)):
        monkeypatch.setattr(clock.contention, "longest_since", lambda before, w=waited: w)
        took = clock.ComputeClock(world, world, 1)(lambda: time.sleep(0.02))
        assert (took >= 0.02) == all_of_it and took > 0

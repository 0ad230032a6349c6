"""Ranks on several hosts: network namespaces with a slow link between them, for real sockets."""

import json
import sys
from pathlib import Path

import namespaces
import pytest
from click.testing import CliRunner

from cptool.cli.main import main

RATE = "200mbit"
IDS = [(7 * i * i + 3 * i) % 299 for i in range(700)]
CONNECT = """
import socket, sys, time
for _ in range(200):
    try:
        socket.create_connection((sys.argv[1], 7), timeout=10)
        sys.exit(0)
    except ConnectionRefusedError:
        time.sleep(0.05)
sys.exit(1)
"""
CPTOOL = [sys.executable, "-m", "cptool"]


def as_json(*arguments) -> dict:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def two_hosts():
    if reason := namespaces.missing():
        pytest.skip(reason)
    with namespaces.Hosts(2, RATE) as hosts:
        yield hosts
    left = {path.name for path in namespaces.NAMES.iterdir()}
    assert left.isdisjoint(hosts.names)


def test_tokens_are_those_of_one_rank_over_a_link_that_holds_its_limit(
    two_hosts, mqa_path, token_file, tmp_path
):
    link = [*CPTOOL, "bench", "link", "--size", "2M", "--pattern", "send-receive", "--repeats", "1"]
    measured = json.loads(two_hosts.run([*link, "--no-overlap", "--json"], timeout=600))
    # Each rank is a host of its own. What passes above the rate is what the bucket holds.
    assert (measured["ranks"], measured["ranks_of_a_host"]) == (2, 1)
    assert measured["results"][0]["rate"] < 1.15 * namespaces.bits(RATE) / 8

    asked = ["generate", str(mqa_path), "--token-ids", token_file(IDS), "-n", "6"]
    expected = as_json(*asked)
    session = str(tmp_path / "two")
    told = two_hosts.run(
        [
            *CPTOOL,
            *asked,
            "--session",
            session,
            "--variant",
            "pass-kv",
            "--json",
        ],
        timeout=600,
    )
    fields = json.loads(told)
    assert (fields["cp"], fields["token_ids"]) == (2, expected["token_ids"])
    (said,) = expected["token_ids"]
    assert as_json("session", "show", session)["tokens"] == [len(IDS) + len(said)]


def test_hosts_go_with_their_processes_after_a_failure():
    if reason := namespaces.missing():
        pytest.skip(reason)
    with pytest.raises(KeyError), namespaces.Hosts(3) as hosts:
        script = "import socket, sys; s = socket.socket(); s.bind((sys.argv[1], 7)); s.listen(); "
        listens = [sys.executable, "-c", script + "s.accept()", hosts.address(0)]
        connects = [sys.executable, "-c", CONNECT, hosts.address(0)]
        hosts.start(0, listens)
        assert hosts.start(2, connects).wait(timeout=30) == 0
        sleeper = hosts.start(2, ["sleep", "600"])
        raise KeyError
    assert sleeper.returncode is not None
    assert not any(Path(namespaces.NAMES, name).exists() for name in hosts.names)

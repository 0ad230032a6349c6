"""Hosts on one machine: network namespaces joined by links of a chosen rate.

Each host is a namespace with one interface, eth0, in a private network: two hosts by a veth pair,
more by a bridge in a namespace of its own. What leaves a host passes a token bucket (`tc tbf`),
so that each direction of a link has the rate. It needs root and iproute2; `missing` tells.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = Path("/run/netns")
PREFIX = "cptool-"
INTERFACE = "eth0"
PORT = 29500

# Linux's default may be BBR, which every ten seconds sends next to nothing for 0.2 s to learn the
# round trip: on a link that is used by turns that is longer than most transfers.
CONGESTION_CONTROL = "reno"


_serial = itertools.count()


def missing() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    try:
        with Hosts(2, "100mbit"):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"


def limit(rate: str | None) -> None:
    """Limits what leaves the host that this process runs in; None lifts the limit.

    The bucket holds what the link sends in 1 ms and at least 32 KiB, so that little passes above
    the rate; the queue holds 20 ms, beyond which packets are dropped.
    """
    if rate is None:
        # Fails where there is no limit.
        subprocess.run(["tc", "qdisc", "del", "dev", INTERFACE, "root"], capture_output=True)
        return
    burst = max(32 << 10, bits(rate) // 8 // 1000)
    _do(
        "tc",
        "qdisc",
        "replace",
        "dev",
        INTERFACE,
        "root",
        "tbf",
        "rate",
        rate,
        "burst",
        str(burst),
        "latency",
        "20ms",
    )


def bits(rate: str) -> int:
    """Bits a second of a rate such as 100mbit."""
    for unit, factor in (("kbit", 10**3), ("mbit", 10**6), ("gbit", 10**9)):
        if rate.endswith(unit):
            return int(float(rate.removesuffix(unit)) * factor)
    raise ValueError(f"rate is {rate!r}; it must end in kbit, mbit or gbit")


class Hosts:
    """`count` hosts while the `with` block runs; what was started in them ends with it."""

    def __init__(self, count: int, rate: str | None = None) -> None:
        self.count, self.rate = count, rate
        own = f"{PREFIX}{os.getpid()}-{next(_serial)}"
        self.names = [f"{own}-{host}" for host in range(count)]
        self._switch = f"{own}-switch"
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        _remove_stale()
        try:
            self._connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for name in (*self.names, self._switch):
            # The interfaces of a namespace go with it.
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    @staticmethod
    def address(host: int) -> str:
        return f"10.201.0.{host + 1}"

    def start(
        self, host: int, command: Sequence[str], core: int | None = None, **environment: str
    ) -> subprocess.Popen:
        """Starts `command` in a host as its only rank of a world with a rank a host."""
        world = {
            "RANK": str(host),
            "WORLD_SIZE": str(self.count),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_WAIT_POLICY": "PASSIVE",
            # The hosts share a memory, by which ranks would know each other as of one machine.
            "CPTOOL_TRANSPORT": "direct",
        }
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *pinned, *command],
            env={**os.environ, **world, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        return process

    def run(self, command: Sequence[str], timeout: float, **environment: str) -> str:
        """What rank 0 writes, of a rank on every host, each on a core of its own.

        Raises RuntimeError with the errors of a rank that fails, TimeoutExpired.
        """
        cores = sorted(os.sched_getaffinity(0))
        ranks = [
            self.start(host, command, cores[host % len(cores)], **environment)
            for host in range(self.count)
        ]
        outputs = [rank.communicate(timeout=timeout) for rank in ranks]
        for host, (rank, (_, errors)) in enumerate(zip(ranks, outputs, strict=True)):
            if rank.returncode:
                raise RuntimeError(f"host {host} exited with {rank.returncode}: {errors}")
        return outputs[0][0]

    def _connect(self) -> None:
        for name in self.names:
            _do("ip", "netns", "add", name)
            _do("ip", "-n", name, "link", "set", "lo", "up")
        if self.count == 2:
            first, second = self.names
            _do(
                "ip",
                "link",
                "add",
                INTERFACE,
                "netns",
                first,
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                second,
            )
        else:
            _do("ip", "netns", "add", self._switch)
            _do("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _do("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for host, name in enumerate(self.names):
                port = f"port{host}"
                _do(
                    "ip",
                    "link",
                    "add",
                    INTERFACE,
                    "netns",
                    name,
                    "type",
                    "veth",
                    "peer",
                    "name",
                    port,
                    "netns",
                    self._switch,
                )
                _do("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
        for host, name in enumerate(self.names):
            _do("ip", "-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
            _do("ip", "-n", name, "link", "set", INTERFACE, "up")
            inside = ("ip", "netns", "exec", name)
            _do(*inside, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}")
            script = "import sys, namespaces; namespaces.limit(sys.argv[1])"
            if self.rate is not None:
                here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
                _do(*inside, sys.executable, "-c", script, self.rate, env=here)


def _remove_stale() -> None:
    """Namespaces of a process that was killed before it could remove them."""
    with contextlib.suppress(FileNotFoundError):
        for path in NAMES.iterdir():
            pid = path.name.removeprefix(PREFIX).partition("-")[0]
            if path.name.startswith(PREFIX) and pid.isdigit() and not Path(f"/proc/{pid}").exists():
                subprocess.run(["ip", "netns", "del", path.name], capture_output=True)


def _do(*command: str, **options) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, **options)

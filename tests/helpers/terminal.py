"""Commands in a terminal of their own, as a user has one."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from pathlib import Path

CTRL_C = b"\x03"


class Terminal:
    """A cptool command whose standard streams are a terminal of 80 columns, and what it showed."""

    def __init__(self, *arguments, **environment):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", _IN_TERMINAL, "-m", "cptool", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm"} | environment,
            start_new_session=True,
        )
        os.close(slave)
        self.shown = ""

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Block until what it showed since the last call matches, and return the match."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert self._read(until - time.monotonic()), f"no {pattern!r} in {self.shown[-2000:]!r}"
        self.shown = self.shown[found.end() :]
        return found[0]

    def end(self, seconds: float = 60) -> int:
        """Block until it has ended and return its exit code; the rest is in `shown`."""
        until = time.monotonic() + seconds
        while self._read(until - time.monotonic()):
            pass
        return self.process.wait(max(0.1, until - time.monotonic()))

    def left(self) -> list[int]:
        """The processes that it started and that do not end within seconds of it."""
        until = time.monotonic() + 5
        while (found := self._running()) and time.monotonic() < until:
            time.sleep(0.02)
        return found

    def _running(self) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, state, *rest = re.sub(r"\(.*\)", "", stat.read_text()).split()
            except OSError:
                continue
            if int(rest[2]) == self.process.pid and state != "Z":  # its session
                found.append(int(pid))
        return found

    def close(self) -> None:
        for pid in self._running():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)

    def _read(self, seconds: float) -> bool:
        """Read what there is; whether anything came."""
        if not select.select([self.master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # it has ended
            return False
        self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))
        return bool(data)


# Makes standard input the controlling terminal, without which Ctrl-C is no signal.
_IN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@contextmanager
def terminal(*arguments, **environment):
    """A `Terminal`, none of whose processes is left."""
    opened = Terminal(*arguments, **environment)
    try:
        yield opened
    finally:
        opened.close()

"""Time that threads wait for processors: two that compete for one."""

import os
import time

import pytest

from cptool.host import contention


def spin(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_a_thread_that_shares_a_processor_waits():
    if not contention.waits():
        pytest.skip("this system does not count it")
    began, before = time.monotonic(), contention.waits()
    allowed = os.sched_getaffinity(0)
    child = os.fork()
    if not child:
        os.sched_setaffinity(0, {min(allowed)})
        spin(0.6)
        os._exit(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        spin(0.6)
    finally:
        os.sched_setaffinity(0, allowed)
        os.waitpid(child, 0)
    assert 0.1 < contention.longest_since(before) < time.monotonic() - began

import pytest

from cptool.host import control_groups, memory

MB = 1 << 20


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a system that has 8 MB available."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(control_groups, "_SELF", tmp_path / "proc/self")
    always = {
        "proc/meminfo": "MemTotal:  9999 kB\nMemAvailable:    8192 kB\nPages: 0\n",
        "proc/self/mountinfo": f"""\
31 23 0:28 / {tmp_path}/cgroup rw,relatime - cgroup2 cgroup2 rw
35 31 0:32 / {tmp_path}/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
""",
    }

    def write(files):
        for name, text in (always | files).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_here():
    assert 0 < memory.available() < 1 << 60


def test_without_groups(system):
    system({})
    assert memory.available() == 8 * MB


@pytest.mark.parametrize("own", [f"{5 * MB}\n", "max\n"])
def test_the_tightest_group_of_the_tree_counts(own, system):
    system(
        {
            "proc/self/cgroup": "0::/user/job\n",
            "cgroup/user/job/memory.max": own,
            "cgroup/user/job/memory.current": f"{2 * MB}\n",
            "cgroup/user/job/memory.stat": f"anon 7\ninactive_file {MB}\n",
            "cgroup/user/memory.max": f"{7 * MB}\n",
            "cgroup/user/memory.current": f"{MB}\n",
            "cgroup/user/memory.stat": "inactive_file 0\n",
        }
    )
    assert memory.available() == (6 if own == "max\n" else 4) * MB


def test_first_version_as_a_container_sees_it(system):
    """Its path is that outside; its root is its own group."""
    system(
        {
            "proc/self/cgroup": "3:cpu:/docker/a\n4:memory:/docker/a\n0::/\n",
            "cgroup/memory/memory.limit_in_bytes": f"{3 * MB}\n",
            "cgroup/memory/memory.usage_in_bytes": f"{2 * MB}\n",
            "cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {MB}\n",
        }
    )
    assert memory.available() == 2 * MB

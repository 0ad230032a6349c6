"""Limits of control groups on CPU time, in trees as containers and batch systems have them."""

import pytest

from cptool.host import affinity, control_groups
from cptool.host.affinity import Place, processors
from cptool.host.control_groups import CpuQuota, cpu_quota

V2 = "31 23 0:28 / {}/all rw - cgroup2 cgroup2 rw\n"
V1 = "32 23 0:29 / {}/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.fixture
def system(tmp_path, monkeypatch):
    monkeypatch.setattr(control_groups, "_SELF", tmp_path / "self")

    def write(mounts, groups, **files):
        (tmp_path / "self").mkdir()
        (tmp_path / "self/mountinfo").write_text(mounts.format(*[tmp_path] * mounts.count("{}")))
        (tmp_path / "self/cgroup").write_text(groups)
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / path.name.replace("cpu_", "cpu.")).write_text(text)

    return write


def test_the_tightest_limit_along_the_path_counts(system):
    system(
        V2,
        "0::/batch/job\n",
        all__cpu_max="max 100000\n",
        all__batch__cpu_max="150000 100000\n",
        all__batch__job__cpu_max="400000 100000\n",
    )
    assert cpu_quota().cpus == 1.5 and cpu_quota().threads() == 1


def test_without_a_limit_without_groups_and_with_files_that_make_no_sense(system, tmp_path):
    assert cpu_quota() is None  # there is no file yet
    system(V2, "0::/\n", all__cpu_max="max 100000\n")
    assert cpu_quota() is None
    for text in ("", "1", "x y", "5 0"):
        (tmp_path / "all/cpu.max").write_text(text)
        assert cpu_quota() is None


def test_the_first_version_names_its_controllers_together(system):
    system(
        V1,
        "5:cpuset:/other\n4:cpu,cpuacct:/docker/a\n0::/\n",
        **{
            "cpu,cpuacct__cpu_cfs_quota_us": "-1\n",
            "cpu,cpuacct__cpu_cfs_period_us": "100000\n",
            "cpu,cpuacct__docker__a__cpu_cfs_quota_us": "250000\n",
            "cpu,cpuacct__docker__a__cpu_cfs_period_us": "100000\n",
        },
    )
    assert cpu_quota().cpus == 2.5


@pytest.mark.parametrize(
    "shown, own",
    [("/docker/a", "/docker/a"), ("/", "/docker/a"), ("/", "/"), ("/docker/a", "/../b")],
)
def test_a_container_sees_its_own_group_at_the_mount_point(system, shown, own):
    """Whatever its path is called: that outside, that of its own name space, or none."""
    system(V2.replace(" / ", f" {shown} "), f"0::{own}\n", all__cpu_max="50000 100000\n")
    assert cpu_quota().cpus == 0.5 and cpu_quota().threads() == 1


def test_a_mount_point_with_a_space(system):
    system(
        V2.replace("all", "all\\040groups"),
        "0::/a\n",
        **{"all groups__a__cpu_max": "300000 100000\n"},
    )
    assert cpu_quota().cpus == 3


def test_ranks_of_one_group_share_its_threads(monkeypatch):
    monkeypatch.setattr(affinity, "core_of", lambda cpu: (0, cpu))
    monkeypatch.setenv("CPTOOL_BIND", "none")
    cpus = range(16)
    for quota, ranks, expected in ((8.9, 1, 8), (8.9, 2, 4), (3.0, 2, 1), (1.0, 4, 1)):
        limit = CpuQuota(quota, 7)
        monkeypatch.setattr(affinity, "usable_cpus", lambda: frozenset(cpus))
        monkeypatch.setattr(affinity, "cpu_quota", lambda limit=limit: limit)

        def gather(value, ranks=ranks):
            return [value] * ranks

        assert affinity.bind(gather, 0, None) == expected
        assert affinity.bind(gather, 0, 16) == 16  # as asked for
    # Ranks of another container have a limit of their own.
    others = ("here", list(cpus), (8.0, 9))
    monkeypatch.setattr(affinity, "machine", lambda: "here")
    monkeypatch.setattr(affinity, "cpu_quota", lambda: CpuQuota(4.0, 7))
    assert affinity.bind(lambda value: [value, others], 0, None) == 4


def test_processors_that_ranks_keep_busy():
    here, there = frozenset({0, 1, 2, 3}), frozenset({2, 3})
    assert processors([Place("a", here, None), Place("a", there, None)]) == 4
    assert processors([Place("a", here, None), Place("b", there, None)]) == 6
    assert processors([Place("a", here, CpuQuota(2.5, 1))] * 3) == 2
    assert processors([Place("a", here, CpuQuota(2, 1)), Place("a", here, CpuQuota(1, 2))]) == 3

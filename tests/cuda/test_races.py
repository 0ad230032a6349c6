"""The race detector of the emulation (tests/cuda_emulation/races.h): what it names, whatever the
order of the threads; that it is silent about the kernels, every other emulated test shows."""

import re

import cuda_emulator
import planted
import pytest
import torch
from reference import check, make_case, tolerance

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """What 20 orders of a program of mistakes.cpp or sm90_mistakes.cpp bring to light."""
    built = {
        source: cuda_emulator.build_mistakes(tmp_path_factory.mktemp(source), source)
        for source in ("mistakes", "sm90_mistakes")
    }

    def run(source: str, name: str, races: bool = True) -> list[str]:
        return [str(built[source](name, seed, races)) for seed in range(20)]

    return run


@pytest.mark.parametrize(
    "source, name",
    [
        *[
            ("mistakes", name)
            for name in ("reversed", "reversed_in_warps", "copied", "sums_of_warps", "multiplied")
        ],
        *[("sm90_mistakes", name) for name in ("none", "own_fences")],
    ],
)
def test_correct_programs_are_clean(programs, source, name):
    assert set(programs(source, name)) == {"None"}


THREAD = r"block \(0, 0\) thread \d+: race at shared offset \d+: "
UNORDERED = ", and nothing orders it after the "


@pytest.mark.parametrize(
    "source, name, message",
    [
        ("mistakes", "without_a_barrier", f"a (read|write){UNORDERED}(write|read) of thread \\d+"),
        ("mistakes", "overwrites_too_early", f"a (read|write){UNORDERED}(write|read) of thread .+"),
        ("mistakes", "without_a_wait", f"a read{UNORDERED}write of cp.async of thread \\d+"),
        ("mistakes", "waits_for_too_few", f"a read{UNORDERED}write of cp.async of thread \\d+"),
        ("mistakes", "without_a_syncwarp", f"a (read|write){UNORDERED}(write|read) of thread .+"),
        ("mistakes", "half_a_syncwarp", f"a (read|write){UNORDERED}(write|read) of thread .+"),
        (
            "sm90_mistakes",
            "no_wait_for_the_load",
            f"a read of wgmma of warpgroup 0{UNORDERED}write of TMA for the mbarrier at 16384",
        ),
        (
            "sm90_mistakes",
            "no_proxy_fence",
            "a read of wgmma of warpgroup 0 of what thread 0 has written without a "
            "fence.proxy.async of its own",
        ),
        (
            "sm90_mistakes",
            "fence_of_one_lane",
            "a read of wgmma of warpgroup 0 of what thread 1 has written without a "
            "fence.proxy.async of its own",
        ),
    ],
)
def test_every_order_shows_a_race(programs, source, name, message):
    for told in programs(source, name):
        assert re.fullmatch(THREAD + message, told), told


def test_what_only_the_detector_sees(programs):
    """A shuffle lets the lanes of the emulation wait for each other, but orders no memory."""
    assert set(programs("mistakes", "without_a_syncwarp", races=False)) == {"None"}


def test_a_fence_publishes_its_own_threads_writes_alone(programs):
    assert set(programs("sm90_mistakes", "fence_of_one_lane", races=False)) == {"wrong result"}
    assert set(programs("sm90_mistakes", "own_fences", races=False)) == {"None"}


def test_a_barrier_whose_initialisation_nothing_orders(programs):
    told = programs("sm90_mistakes", "no_init_barrier")
    assert all(re.search("no mbarrier is initialised|race at shared offset 16384", x) for x in told)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return planted.build_other_races(tmp_path_factory.mktemp("planted_races"))


@pytest.mark.parametrize("name", ["", *planted.OTHER_RACES])
def test_races_planted_in_the_kernels(kernels, name):
    """Named in the first order that is tried."""
    kernels._library.emulated_mistake(["", *planted.OTHER_RACES].index(name))

    def run():
        for sequences, kernel in (
            ([(range(40), range(70))], "simt"),
            ([(range(150), range(150))], "sm80"),
            ([([219], range(220))], "sm80"),  # three tiles in the end
        ):
            if name and not name.startswith((kernel, "merge")):
                continue
            case = make_case(sequences, heads=(2, 2), dtype=torch.bfloat16, slack=3)
            keep = torch.arange(len(case.k_pos)) % 3 == 0
            running = kernels.attention(*case.only_keys(keep).arguments, kernel=kernel)
            rest = case.only_keys(~keep).arguments
            result = kernels.attention(*rest, kernel=kernel, into=running)
            check(case, result, tolerance(case, torch.bfloat16, merged=True))
        if not name or name.startswith("merge"):
            kernels.merge(list(torch.randn(20, 3, 2, 64)), list(torch.randn(20, 3, 2)))

    if not name:
        return run()
    where = "global" if "lse" in name else "shared"
    with pytest.raises(RuntimeError, match=f"race at {where} offset .* nothing orders it after"):
        run()

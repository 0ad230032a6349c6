"""The emulated CUDA kernels with mistakes planted in them, one at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from cuda_emulator import EMULATION, ROOT, Emulator, build, build_kernels

MISTAKES: dict[str, tuple[str, str, str]] = {
    # name: file of csrc/cuda/sm90, a piece of it, and the same with the condition {planted}
    "a key too many": (
        "softmax.h",
        "if (column >= ends[row] ||",
        "if (column >= ends[row] + {planted} ||",
    ),
    "a buffer is never released": (
        "consumer.h",
        "    release(shared.k_empty[turn.stage()]);",
        "    if (!{planted}) release(shared.k_empty[turn.stage()]);",
    ),
    "limits are read before they are there": (
        "consumer.h",
        "    ptx::mbarrier_wait(address(shared.limits_full",
        "    if (!{planted}) ptx::mbarrier_wait(address(shared.limits_full",
    ),
    "cleared values stay with the threads": (
        "producer.h",
        "      ptx::fence_proxy_async();",
        "      if (!{planted}) ptx::fence_proxy_async();",
    ),
    "no change of scale": (
        "consumer.h",
        "out[i] *= keep[i / 2 % 2];",
        "if (!{planted}) out[i] *= keep[i / 2 % 2];",
    ),
    "scores are read while in flight": (
        "consumer.h",
        "      ptx::wgmma_wait<1>();",
        "      if (!{planted}) ptx::wgmma_wait<1>();",
    ),
    "a product without its fence": (
        "consumer.h",
        "        columns_descriptor(ptx::shared_address(shared.v[before.stage()]), "
        "Plan::kPanelBytes);\n    ptx::wgmma_fence();",
        "        columns_descriptor(ptx::shared_address(shared.v[before.stage()]), "
        "Plan::kPanelBytes);\n    if (!{planted}) ptx::wgmma_fence();",
    ),
    "queries of the next row's swizzle": (
        "consumer.h",
        "+ lane / 16) ^ (row % 8);",
        "+ lane / 16) ^ ((row + {planted}) % 8);",
    ),
    "queries are given back before they are read": (
        "consumer.h",
        "      load_queries(queries);\n      __syncwarp();  // every lane has read\n"
        "      release(shared.q_empty);",
        "      if ({planted}) release(shared.q_empty);\n"
        "      for (int i = 0; i < 300 * {planted}; ++i) emulation::yield();\n"
        "      load_queries(queries);\n      __syncwarp();  // every lane has read\n"
        "      if (!{planted}) release(shared.q_empty);",
    ),
    "queries change while in flight": (
        "consumer.h",
        "      issue_values(weights, out);\n      give_token();",
        "      issue_values(weights, out);\n      if ({planted}) queries[1] = 0;\n"
        "      give_token();",
    ),
    "pieces begin at the first key": (
        "producer.h",
        "    job.first_key += begin;",
        "    if (!{planted}) job.first_key += begin;",
    ),
    "a window that is longer by one": (
        "producer.h",
        "      const int64_t last = q_pos[row / launch.group] - args.window;",
        "      const int64_t last = q_pos[row / launch.group] - args.window - {planted};",
    ),
    "a window that is shorter by one": (
        "producer.h",
        "        first = find_between(k_pos, begin",
        "        first = {planted} + find_between(k_pos, begin",
    ),
    "the tile in which windows begin counts as wholly visible": (
        "consumer.h",
        "if (!tile_is_masked(tile, job.dense_begin, job.dense_keys)) return;",
        "if (!tile_is_masked(tile, job.dense_begin - {planted} * kKeys, job.dense_keys)) return;",
    ),
    "one tile too many is skipped ahead of the windows": (
        "producer.h",
        "      runs[run].begin = first / kKeys;",
        "      runs[run].begin = first / kKeys;\n"
        "      if ({planted} && tile_count(limit) > first / kKeys + 1) ++runs[run].begin;",
    ),
    "one tile too many is skipped behind the windows": (
        "producer.h",
        "runs[count - 1].end = tile_count(seen);",
        "runs[count - 1].end = tile_count(seen - {planted} * kKeys);",
    ),
    "the tile of a buffer is read when the next may be there": (
        "consumer.h",
        "      tile = tile_of_keys(left);\n      scores_done(scores, queries, left);",
        "      if (!{planted}) tile = tile_of_keys(left);\n"
        "      scores_done(scores, queries, left);\n"
        "      for (int i = 0; i < 300 * {planted}; ++i) emulation::yield();\n"
        "      if ({planted}) tile = tile_of_keys(left);",
    ),
    "large scores are capped like small ones": (
        "softmax.h",
        "fmaxf(even, odd) >= kSmallTangent",
        "fmaxf(even, odd) >= kSmallTangent + 99 * {planted}",
    ),
    "a job's memory is given back while it is read": (
        "consumer.h",
        "      const Job& job = next_job(shared, job_turn);\n      if (job.rows < 0) break;",
        "      const Job& job = next_job(shared, job_turn);\n      if (job.rows < 0) break;\n"
        "      if ({planted}) release(shared.job_empty[job_turn.stage()]);",
    ),
    "one lane's fence for all": (
        "producer.h",
        " ptx::fence_proxy_async();\n      __syncwarp();",
        " if (!{planted} || lane == 0) ptx::fence_proxy_async();\n      __syncwarp();",
    ),
    "values are given back while they are multiplied": (
        "consumer.h",
        "advance(v, step_across_rows(step)));\n    }\n    ptx::wgmma_commit();",
        "advance(v, step_across_rows(step)));\n    }\n    ptx::wgmma_commit();\n"
        "    if ({planted}) release(shared.v_empty[before.stage()]);",
    ),
    "a lane arrives for those that still write": (
        "producer.h",
        "    __syncwarp();\n    if (lane == 0) ptx::mbarrier_arrive(address(shared.limits_full",
        "    if (!{planted}) __syncwarp();\n"
        "    if (lane == 0) ptx::mbarrier_arrive(address(shared.limits_full",
    ),
}

RACES = (
    "limits are read before they are there",
    "queries are given back before they are read",
    "a job's memory is given back while it is read",
    "one lane's fence for all",
    "values are given back while they are multiplied",
    "a lane arrives for those that still write",
)
"""Those of MISTAKES that are races."""

OTHER_RACES: dict[str, tuple[str, str, str]] = {
    # The same in csrc/cuda, for the other kernels.
    "simt: keys are overwritten while they are read": (
        "attention_simt.cu",
        "key + Shared::kKeys > dense_end);\n    __syncthreads();",
        "key + Shared::kKeys > dense_end);\n    if (!{planted}) __syncthreads();",
    ),
    "sm80: a tile is read before it is there": (
        "sm80/kernel.h",
        "    ptx::cp_async_wait<C::kStages - 2>();",
        "    if (!{planted}) ptx::cp_async_wait<C::kStages - 2>();",
    ),
    "sm80: lse is written while it is read": (
        "sm80/kernel.h",
        "      __syncwarp();  // every lane of the row has read its lse",
        "      if (!{planted}) __syncwarp();",
    ),
    "sm80: partials overwrite tiles": (
        "sm80/kernel.h",
        "    __syncthreads();  // every warp is done with the slots",
        "    if (!{planted}) __syncthreads();",
    ),
    "merge: sums are read before they are there": (
        "merge.cu",
        "  __syncthreads();\n  if (!held || group != 0) return;",
        "  if (!{planted}) __syncthreads();\n  if (!held || group != 0) return;",
    ),
}

SLOW = (
    "producer.h",
    "  for (int32_t row = lane; row < Plan::kRows; row += kWarp) {\n    int32_t limit = 0;",
    "  for (int i = 0; i < 300; ++i) emulation::yield();\n"
    "  for (int32_t row = lane; row < Plan::kRows; row += kWarp) {\n    int32_t limit = 0;",
)
"""No mistake, but a search that takes long, as memory may."""

NUMBERS = {name: number for number, name in enumerate(MISTAKES, 1)}


def plant(directory: Path, mistakes: Iterable[tuple[int, tuple[str, str, str]]]) -> Path:
    """A copy of csrc with numbered mistakes: each a file of csrc/cuda, a piece of it, and the same
    with the condition {planted}, which holds while `emulated_mistake` is given the number.
    """
    csrc = directory / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for number, (file, right, wrong) in mistakes:
        path = csrc / "cuda" / file
        text = path.read_text()
        assert text.count(right) == 1, f"{file} has {text.count(right)} times {right!r}"
        condition = f"(emulation::options.mistake == {number})"
        path.write_text(text.replace(right, wrong.replace("{planted}", condition)))
    return csrc


def build_planted(directory: Path) -> Path:
    """The library; it makes the mistake whose number `emulated_mistake` is given."""
    changes = [(NUMBERS[name], change) for name, change in MISTAKES.items()] + [(0, SLOW)]
    csrc = plant(directory, [(n, (f"sm90/{file}", *texts)) for n, (file, *texts) in changes])
    sources = [csrc / "cuda" / "sm90" / "attention.cu", csrc / "cuda" / "merge.cu"]
    driver = EMULATION / "sm90_driver.cpp"
    return build(directory, [*sources, driver], "planted", csrc=csrc, flags=["-O1"])


def build_other_races(directory: Path) -> Emulator:
    """All kernels but sm90; they make a mistake of OTHER_RACES, numbered from 1 on."""
    csrc = plant(directory, enumerate(OTHER_RACES.values(), 1))
    return build_kernels(directory, csrc=csrc, flags=["-O1"])

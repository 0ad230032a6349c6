"""The emulated kernel of compute capability 9.0 with mistakes planted in it, one at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

from cuda_emulator import EMULATION, ROOT, build

MISTAKES: dict[str, tuple[str, str, str]] = {
    # name: file of csrc/cuda/sm90, a piece of it, and the same with the condition {planted}
    "a key too many": (
        "softmax.h",
        "if (column >= limit[i / 2 % 2])",
        "if (column >= limit[i / 2 % 2] + {planted})",
    ),
    "a buffer is never released": (
        "consumer.h",
        "    release(shared.k_empty[turn.stage()]);",
        "    if (!{planted}) release(shared.k_empty[turn.stage()]);",
    ),
    "limits are read before they are there": (
        "consumer.h",
        "      ptx::mbarrier_wait(address(shared.limits_full",
        "      if (!{planted}) ptx::mbarrier_wait(address(shared.limits_full",
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
    "a job's memory is given back while it is read": (
        "consumer.h",
        "      const Job& job = next_job(shared, job_turn);\n      if (job.rows < 0) break;",
        "      const Job& job = next_job(shared, job_turn);\n      if (job.rows < 0) break;\n"
        "      if ({planted}) release(shared.job_empty[job_turn.stage()]);",
    ),
}

SLOW = (
    "producer.h",
    "  const int32_t first = job.keys > 0 ? k_pos[0] : 0;\n#pragma",
    "  for (int i = 0; i < 300; ++i) emulation::yield();\n"
    "  const int32_t first = job.keys > 0 ? k_pos[0] : 0;\n#pragma",
)
"""No mistake, but a search that takes long, as memory may."""

NUMBERS = {name: number for number, name in enumerate(MISTAKES, 1)}


def build_planted(directory: Path) -> Path:
    """The library; it makes the mistake whose number `emulated_mistake` is given."""
    csrc = directory / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for name, (file, right, wrong) in [*MISTAKES.items(), ("", SLOW)]:
        path = csrc / "cuda" / "sm90" / file
        text = path.read_text()
        assert text.count(right) == 1, f"{name}: {file} has {text.count(right)} times {right!r}"
        condition = f"(emulation::options.mistake == {NUMBERS.get(name, 0)})"
        path.write_text(text.replace(right, wrong.replace("{planted}", condition)))
    sources = [csrc / "cuda" / "sm90" / "attention.cu", csrc / "cuda" / "merge.cu"]
    driver = EMULATION / "sm90_driver.cpp"
    return build(directory, [*sources, driver], "planted", csrc=csrc, flags=["-O1"])

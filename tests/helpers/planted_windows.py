"""The emulated kernels of compute capability 8.0 with mistakes planted in their windows and soft
caps, one at a time.
"""

from __future__ import annotations

from pathlib import Path

from cuda_emulator import EMULATION, build
from planted import plant

MASKS = (
    "      if (capped) mine.cap(cap_scale);\n"
    "      if (first + C::kWarpKeys > dense_end) mine.mask(limits + warp_row, first);\n"
    "      if (!C::kPlain && first < dense_begin) mine.mask_ahead(firsts + warp_row, first);\n"
)

MISTAKES: dict[str, tuple[str, str, str]] = {
    # name: file of csrc/cuda, a piece of it, and the same with the condition {planted}
    "a window that is longer by one": (
        "block_rows.h",
        "const int64_t window = args.window;",
        "const int64_t window = args.window + {planted};",
    ),
    "a window that is shorter by one": (
        "block_rows.h",
        "const int64_t window = args.window",
        "const int64_t window = args.window - {planted}",
    ),
    "the first key of a window is hidden": (
        "sm80/warp.h",
        "if (8 * n < begin)",
        "if (8 * n < begin + {planted})",
    ),
    "the key ahead of a window is seen": (
        "sm80/warp.h",
        "if (8 * n + 1 < begin)",
        "if (8 * n + 1 < begin - {planted})",
    ),
    "the key behind the last one is seen": (
        "sm80/warp.h",
        "if (8 * n >= end)",
        "if (8 * n >= end + {planted})",
    ),
    "the tile in which a window begins counts as wholly visible": (
        "sm80/kernel.h",
        "dense_begin = last_row < warp_row ? 0 : firsts[last_row];",
        "dense_begin = last_row < warp_row ? 0 : firsts[last_row] & ({planted} ? -kKeys : -1);",
    ),
    "what the first row of a warp sees counts as wholly visible": (
        "sm80/kernel.h",
        "dense_begin = last_row < warp_row ? 0 : firsts[last_row]",
        "dense_begin = last_row < warp_row ? 0 : firsts[{planted} ? warp_row : last_row]",
    ),
    "what the last row of a warp sees counts as wholly visible": (
        "sm80/kernel.h",
        "const int dense_end = last_row < warp_row ? 0 : limits[warp_row];",
        "const int dense_end = last_row < warp_row ? 0 : limits[{planted} ? last_row : warp_row];",
    ),
    "a block skips one tile too many": (
        "sm80/kernel.h",
        "const int origin = firsts[0] / kKeys * kKeys;",
        "const int origin = (firsts[0] / kKeys + {planted}) * kKeys;",
    ),
    "a warp skips one tile too many": (
        "sm80/kernel.h",
        "first + C::kWarpKeys > warp_begin)",
        "first + C::kWarpKeys > warp_begin + {planted} * C::kWarpKeys)",
    ),
    "a warp skips what its last row does not see": (
        "sm80/kernel.h",
        "warp_begin = last_row < warp_row ? 0 : firsts[warp_row];",
        "warp_begin = last_row < warp_row ? 0 : firsts[{planted} ? last_row : warp_row];",
    ),
    "one tile too many is skipped behind a gap": (
        "sm80/walk.h",
        "if (firsts[row] <= at) return at / kKeys * kKeys;",
        "if (firsts[row] <= at) return (at / kKeys + {planted}) * kKeys;",
    ),
    "a gap begins one tile early": (
        "sm80/walk.h",
        "if (row == rows) return end;",
        "if (row == rows || {planted}) return gap_end;",
    ),
    "gaps are not skipped": (
        "sm80/walk.h",
        "if (at < gap_begin || at >= gap_end) return at;",
        "if (at < gap_begin || at >= gap_end || {planted}) return at;",
    ),
    "pieces of all keys instead of the visible ones": (
        "sm80/kernel.h",
        "key_range(max(limits[rows - 1] - origin, 0)",
        "key_range(max(limits[rows - 1] - origin * !{planted}, 0)",
    ),
    "no cap": (
        "sm80/kernel.h",
        "const bool capped = !C::kPlain && args.cap > 0.0f;",
        "const bool capped = !C::kPlain && args.cap > 0.0f && !{planted};",
    ),
    "hidden scores are capped": (
        "sm80/kernel.h",
        MASKS,
        MASKS.replace("(capped)", "(capped && !{planted})")
        + "      if (capped && {planted}) mine.cap(cap_scale);\n",
    ),
    "the sign of large scores is lost": (
        "soft_cap.h",
        "copysignf(large, x)",
        "({planted} ? large : copysignf(large, x))",
    ),
}
NUMBERS = {name: number for number, name in enumerate(MISTAKES, 1)}


def build_planted(directory: Path) -> Path:
    """The library; it makes the mistake whose number `emulated_mistake` is given."""
    csrc = plant(directory, [(NUMBERS[name], change) for name, change in MISTAKES.items()])
    names = ("sm80/attention.cu", "sm80/few_rows_general.cu", "sm80/many_rows_general.cu")
    sources = [csrc / "cuda" / name for name in (*names, "merge.cu")]
    driver = EMULATION / "sm80_windows_driver.cpp"
    return build(directory, [*sources, driver], "planted", csrc=csrc, flags=["-O1"])

"""The memory that a rank needs, so that what does not fit is refused before anything starts.

It is the one model of memory: `cptool plan`, `bench emulate` and every command that computes go by
it. Each allocation that grows with tokens is counted where the code makes it; on a CPU the figures
are those of resident memory.
"""

from __future__ import annotations

from cptool.model.row_limits import ROWS_AT_ONCE, ROWS_AT_ONCE_CPU
from cptool.planning.cost.forward import Forward
from cptool.planning.hardware import HardwareProfile
from cptool.units import size
from cptool.variants import MessageBytes, find

RESERVED = 0.04
"""Part of a device's memory taken by its context, fragmentation and the buffers of links."""
PROCESS_BYTES, CODE_BYTES = 165e6, 90e6
"""Of a rank on a CPU, whatever it computes: the data of the interpreter, torch and their libraries
with what the C library keeps of what was freed, and their code, which the ranks of a machine share.
"""
TOKEN_BYTES = 80
"""Of a token on the host of every rank: its number in the lists of what was said, its position."""
PANEL_ELEMENTS, PANEL_COPIES = 1 << 20, 10
"""Of stored weights that are widened at once where many rows are multiplied with them
(`cptool.ops.stored`), and how many times as much oneDNN was measured to take beside them."""

FP8_PIECE = 1 << 22
"""Elements of weights in FP8 that are widened at a time where they are not multiplied as they are
(`cptool.ops.fp8`)."""


def memory_per_rank(
    variant: str, forward: Forward, profile: HardwareProfile, room: int | None = None
) -> dict[str, float]:
    """Return the bytes on the fullest rank at the peak of a forward, by use.

    process: what a rank takes on a CPU before it has read anything. weights: on a CPU the ranks of
    a machine hold one copy between them, of which each counts its part, in the page cache where
    the file stays their memory; on other devices each has its own, replicated over CP ranks, with
    embedding and output head replicated over TP ranks too. kv. workspace: what a layer computes
    beside that. messages: buffers that receive, and partial results.

    room: tokens of all sequences and CP ranks that the cache has room for, by default those that
        the forward leaves in it.
    """
    room = max(room or 0, forward.cached + forward.new)
    held = -(-room // forward.ranks)
    kv = forward.config.num_hidden_layers * held * forward.kv_width * forward.kv_element
    if forward.kv_memory is not None:
        kv = min(kv, forward.kv_memory)
    process = PROCESS_BYTES + CODE_BYTES / _on_machine(forward) + TOKEN_BYTES * room
    kept, passing = _messages(variant, forward)
    return {
        "process": process if profile.device == "cpu" else 0.0,
        "weights": _weights(forward, profile),
        "kv": kv + 4.0 * held,
        "workspace": _workspace(forward, profile, passing),
        "messages": kept + passing,
    }


def in_words(memory: dict[str, float]) -> str:
    """Return the uses of memory that there are, such as "weights 67.6 GB, kv 8.06 GB"."""
    return ", ".join(f"{name} {size(count)}" for name, count in memory.items() if count)


def remedies(memory: dict[str, float], most: float, *, chunks: bool, wide: bool) -> list[str]:
    """Return what makes less than `most` bytes of memory needed, in words, beside more ranks.

    chunks: whether a smaller chunk can be requested. wide: whether KV can be in fewer bits.
    """
    passing = memory["workspace"] + memory["messages"]
    found = []
    if chunks and sum(memory.values()) - passing <= most:
        found.append("a smaller `chunk`")
    if wide and memory["kv"] > most / 10:
        found.append("`kv_dtype` bfloat16")
    return found


def _weights(forward: Forward, profile: HardwareProfile) -> float:
    config = forward.config
    matrices = sum(forward.weight_bytes(*matrix) for matrix in forward.linear_layers())
    matrices *= config.num_hidden_layers
    table = forward.weight_bytes(config.vocab_size * config.hidden_size, forward.dtype)
    tables = table if config.tie_word_embeddings else 2 * table
    if profile.device != "cpu":
        return matrices + tables
    together = _on_machine(forward)
    return (min(forward.tp, together) * matrices + tables) / together


def _on_machine(forward: Forward) -> int:
    """Return how many ranks share a machine's memory."""
    return forward.local or forward.ranks * forward.tp


def _workspace(forward: Forward, profile: HardwareProfile, passing: float) -> float:
    """Return the bytes that a forward allocates beside weights, KV and messages.

    That is the residual stream and the rotary tables, and the most of what is live at a time beside
    them: while q, k and v are projected, in attention with the `passing` bytes of its partial
    results, while its result is projected, in a slice of the feed-forward network, or with the
    logits.
    """
    config, e, rows = forward.config, forward.element, forward.queries
    hidden, query = config.hidden_size, forward.query_width
    feed_forward = config.intermediate_size / forward.tp
    # A normed copy of the stream, and q, k and v, stay until attention's result is projected.
    attending = rows * (hidden + query + forward.kv_width) * e
    result = rows * query * e
    sliced = min(rows, ROWS_AT_ONCE_CPU if profile.device == "cpu" else ROWS_AT_ONCE)
    most = max(
        attending + rows * _panel(forward, profile, hidden),
        attending + result + rows * 4 * forward.heads + passing,
        attending + result + rows * (hidden * e + _panel(forward, profile, query)),
        rows * hidden * e
        + sliced * (2 * hidden + 2 * feed_forward) * e
        + sliced * _panel(forward, profile, feed_forward),
        forward.batch * config.vocab_size * (4 + e),
    )
    whole = rows * (hidden * e + 4 * config.head_dim + 12)  # 12: of numbers and positions
    if _in_panels(forward, profile):
        whole += 4 * PANEL_COPIES * min(PANEL_ELEMENTS, hidden * feed_forward)
    if profile.device == "cpu" and forward.feed_forward == "float8":
        # The rows in FP8 and in float32.
        whole += 4 * FP8_PIECE + 5 * sliced * max(hidden, feed_forward)
    return whole + max(0.0, most - passing)


def _in_panels(forward: Forward, profile: HardwareProfile) -> bool:
    """Return whether many rows are multiplied with one panel of stored weights at a time."""
    if profile.device != "cpu" or forward.weight_size is None or forward.feed_forward == "float8":
        return False
    return profile.stored is None or profile.stored.panels


def _panel(forward: Forward, profile: HardwareProfile, depth: float) -> float:
    """Return the bytes per row of the result of one panel of stored weights of this depth, before
    it is copied to its place.
    """
    if not _in_panels(forward, profile):
        return 0.0
    return 4 * min(PANEL_ELEMENTS / depth, forward.config.hidden_size)


def _messages(variant: str, forward: Forward) -> tuple[float, float]:
    """Return the bytes of messages that stay from layer to layer, and that pass with attention."""
    if forward.ranks == 1:
        return 0.0, 0.0
    block = forward.keys * forward.kv_width * forward.kv_element
    queries = forward.queries * forward.query_width * forward.element
    partial = forward.partial(forward.queries)
    # Keys are copied that travel from a batch; with windows those that others see, and in gather-kv
    # those that this rank's own queries see, too.
    config = forward.config
    windowed = any(config.hiding_window(n) is not None for n in range(config.num_hidden_layers))
    copies = 2 if windowed else int(forward.batch > 1)
    sizes = MessageBytes(
        ranks=forward.ranks,
        block=block,
        packed=copies * block,
        everything=(forward.cached + forward.new) * forward.kv_width * forward.kv_element,
        queries=queries,
        partial=partial,
        running=forward.queries * (forward.query_width + forward.heads) * 4,
        all_queries=forward.sources * queries,
        all_partials=forward.sources * partial,
    )
    record = find(variant)
    return record.kept(sizes), record.buffers(sizes)

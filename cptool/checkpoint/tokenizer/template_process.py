"""Renders chat templates in a process of its own, whose memory and time are bounded.

A chat template is a program that came with a file: one line of it can use any amount of memory or
time, and Jinja's sandbox limits neither. So this module runs apart: it reads requests from
standard input and writes replies to standard output, each a length of eight bytes and that much
JSON, until its input ends. It imports Jinja and nothing that is slow to load.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, BinaryIO, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.sandbox

# Bounds for a request of `size` bytes. Ordinary templates take milliseconds and about the text's
# size; a document of many megabytes passes through filters and is copied a few times.
_MEMORY, _MEMORY_PER_BYTE = 1 << 30, 64
_CPU_S_PER_BYTE = 2e-6
_OUTPUT, _OUTPUT_PER_BYTE = 64 << 20, 16


def serve() -> None:
    """Reply to requests, by `{"text": ...}` or `{"error": ...}`, until standard input ends.

    A request that takes more than its `cpu_s` seconds of processor time (and 2 s per MB) ends the
    process with SIGXCPU.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller.
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    while (request := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, _reply(request))


def receive(file: BinaryIO) -> bytes | None:
    """Return the next message, None if the other side is gone."""
    head = file.read(8)
    if len(head) < 8:
        return None
    body = file.read(length := int.from_bytes(head, "little"))
    return body if len(body) == length else None


def send(file: BinaryIO, message: bytes) -> None:
    """Write a message to the other side."""
    file.write(len(message).to_bytes(8, "little"))
    file.write(message)
    file.flush()


def _reply(request: bytes) -> bytes:
    size = len(request)
    fields = json.loads(request)
    _limit(size, fields.pop("cpu_s"))
    try:
        text = _render(limit=_OUTPUT + _OUTPUT_PER_BYTE * size, **fields)
        return json.dumps({"text": text}).encode()
    except MemoryError:
        reason = f"it takes more than {(_MEMORY + _MEMORY_PER_BYTE * size) >> 20:,} MB of memory"
    except RecursionError:
        reason = "it calls itself without end"
    except Exception as error:  # The template is its author's program: it may raise anything.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return json.dumps({"error": reason}).encode()


def _limit(size: int, cpu_s: float) -> None:
    """Bound the memory and the further processor time of this process."""
    page = resource.getpagesize()
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * page
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = usage.ru_utime + usage.ru_stime + cpu_s + _CPU_S_PER_BYTE * size
    for kind, value in (
        (resource.RLIMIT_AS, mapped + _MEMORY + _MEMORY_PER_BYTE * size),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bounded, hard))


def _render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    tokens: Mapping[str, str],
    limit: int,
) -> str:
    pieces, length = [], 0
    for piece in _compile(template).generate(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        tools=None,
        documents=None,
        **tokens,
    ):
        length += len(piece)
        if length > limit:
            raise ValueError(f"it writes more than {limit >> 20:,} MB")
        pieces.append(piece)
    return "".join(pieces)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` blocks, which mark answers for training: here just their body."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (an instance variable, as Jinja declares it)

    def parse(self, parser: Any) -> Any:
        """Return the body of a block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    variables = cast("dict[str, Any]", environment.globals)
    variables.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


if __name__ == "__main__":
    serve()

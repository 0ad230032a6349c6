"""Chat templates: a model's Jinja program that turns messages into one text."""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, cast

from cptool.checkpoint.tokenizer.input_checks import check_text
from cptool.errors import RunError, UserError

Message = Mapping[str, Any]

# Processor time that a template may use, and how long a loaded machine may take to give it that.
CPU_S = 10
_PATIENCE_S = 300.0


class TemplateLimitError(UserError):
    """The template took more time or memory than any template needs."""


def render(
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    tokens: Mapping[str, str],
) -> str:
    """Return the text of a conversation, as transformers' `apply_chat_template` renders it.

    `tokens` are the variables that name special tokens: `bos_token`, `eos_token`. The template runs
    in a sandbox, in a process whose memory and time are bounded. Raises UserError if it is faulty,
    refuses the messages, writes what is not text, or exceeds its bounds.
    """
    request = {
        "template": template,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tokens": tokens,
        "cpu_s": CPU_S,
    }
    reply = _worker().ask(json.dumps(request).encode())
    if "error" in reply:
        raise UserError(
            f"the model's chat template refuses these messages ({reply['error']}); check their "
            f"roles and order, or give a plain prompt"
        )
    text = reply["text"]
    try:
        check_text(text)
    except UserError:
        raise UserError(
            "the model's chat template writes half a character (a lone surrogate), which is not "
            "text; give a plain prompt"
        ) from None
    return text


class _Worker:
    """The process that renders: one per calling process, started anew if it has ended."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, Any]:
        """Send a request and return its reply; TemplateLimitError if it exceeds its bounds."""
        from cptool.checkpoint.tokenizer.template_process import receive, send

        with self._lock:
            process, ready = self._started(), True
            stdin, stdout = (cast(BinaryIO, pipe) for pipe in (process.stdin, process.stdout))
            try:
                send(stdin, request)
                ready = bool(select.select([stdout], [], [], _PATIENCE_S)[0])
                reply = receive(stdout) if ready else None
            except BrokenPipeError:
                reply = None
            except BaseException:  # Ctrl-C: the reply to this request must not answer the next one.
                self.end()
                raise
            if reply is not None:
                answer: dict[str, Any] = json.loads(reply)
                return answer
            code = self.end()
            if code in (-signal.SIGXCPU, -signal.SIGKILL) or not ready:
                why = f"takes more than {CPU_S} s"
            else:
                why = f"ends the process that runs it (status {code})"
            raise TemplateLimitError(f"the model's chat template {why}; give a plain prompt")

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            # The module search path of this process, for -c and -m alike put the current
            # directory in front, which may hold anything.
            start = (
                f"import sys; sys.path[:] = {sys.path!r}; "
                "from cptool.checkpoint.tokenizer.template_process import serve; serve()"
            )
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", start],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C at the terminal is not for it.
                )
            except OSError as error:
                raise RunError(
                    f"the process that renders chat templates cannot start ({error.strerror})"
                ) from None
        return self._process

    def end(self) -> int | None:
        """End the process, if it is there, and return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        ended = process.poll() is not None
        if not ended:
            try:  # Its output has ended, so it is ending; if not, it is stuck.
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was not sent
                cast(BinaryIO, pipe).close()
        return code


_current: _Worker | None = None


def _worker() -> _Worker:
    global _current
    if _current is None or _current.owner != os.getpid():
        # After a fork the process belongs to the parent.
        _current = _Worker()
        atexit.register(_current.end)
    return _current


def default_template(value: Any) -> str | None:
    """Return the template of a `chat_template` setting: a text, or named ones as a list or dict."""
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        value = {str(entry.get("name")): entry.get("template") for entry in entries}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None

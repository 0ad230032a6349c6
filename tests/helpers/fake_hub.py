"""A server on this machine that answers as the Hugging Face hub does, for one repository."""

import hashlib
import http.server
import json
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

COMMIT = "1" * 40
_LARGE = 1 << 16


class Hub:
    """The server: the names of the files that were fetched, in order.

    pause_s: seconds between the pieces of a large file, of which there are about 20.
    """

    def __init__(self, url: str) -> None:
        self.url, self.pause_s, self.fetched = url, 0.0, []

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables of a client that keeps what it fetches in `cache`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}


@contextmanager
def hub(directory: Path):
    """Serve the files of `directory` as the repository org/tiny."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self._answer(body=False)

        def do_GET(self):
            self._answer(body=True)

        def _answer(self, body):
            path = self.path.partition("?")[0]
            if found := re.fullmatch(r"/org/tiny/resolve/[^/]+/(.+)", path):
                self._file(directory / found[1], body)
            elif path.startswith("/api/models/org/tiny/tree/"):
                self._json([_entry(file) for file in sorted(directory.iterdir())])
            elif path.startswith("/api/models/org/tiny"):
                names = [{"rfilename": file.name} for file in sorted(directory.iterdir())]
                self._json({"id": "org/tiny", "sha": COMMIT, "siblings": names})
            else:
                self.send_error(404)

        def _json(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _file(self, file, body):
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{_hash(file)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                state.fetched.append(file.name)
                step = max(_LARGE, len(data) // 20)
                for at in range(0, len(data), step):
                    self.wfile.write(data[at : at + step])
                    time.sleep(state.pause_s if len(data) > _LARGE else 0)

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):  # a client that goes away is part of the test
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        state = Hub(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _entry(file: Path) -> dict:
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _hash(file)[:40]}

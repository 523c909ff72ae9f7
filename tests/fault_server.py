"""A reward server and vision-language judge that misbehaves to order: a process of its own on 127.0.0.1.

Where it fits: tests of `RemoteReward`, the judges and their transport. Why it exists: what breaks in a run breaks on a
real socket (a reset, half an answer, silence), which a mocked client would never show.

    with FaultServer() as server:
        server.behave({"do": "status", "status": 500}, {"do": "compute"})   # the first request, then all others
        ...                                                                  # talk to server.url
        server.log()                                                         # what arrived, in order

Behaviours: `compute` (the default; scores are the prompts read as numbers), `chat` (see `_chat`), `status` (with
`status` and `headers`), `body` (200, or `status`, with the text `body` and so many `blanks`, perhaps in a `packing`),
`truncate` (half of what was announced), `reset`, `hang`; any of them after `sleep` seconds. Gotcha: only the standard
library is imported, so that a process starts in no time.
"""

import gzip
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self


class FaultServer:
    """The process, for `with`; `stop` and `start` make it die and come back at the same address."""

    def __init__(self) -> None:
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", str(Path(__file__)), str(self.port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def behave(self, *behaviours: dict[str, Any]) -> None:
        """What to do with the next requests, one each; the last one stays. Forgets the log."""
        self._control("/behave", list(behaviours))

    def log(self) -> list[dict[str, Any]]:
        """`{"path", "token", "body", "began"}` of the requests so far; `began` is `time.monotonic`."""
        return self._control("/log", None)

    def _control(self, path: str, value: Any) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(value).encode())
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=5) as response:
            return json.loads(response.read())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviours: ClassVar[list[dict[str, Any]]] = [{"do": "compute"}]
    requests: ClassVar[list[dict[str, Any]]] = []
    lock = threading.Lock()

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        cls = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/behave":
            cls.behaviours, cls.requests = body, []
            return self.answer(b"null")
        if self.path == "/log":
            return self.answer(json.dumps(cls.requests).encode())
        self.respond(body)

    def do_GET(self) -> None:
        self.respond(None)

    def respond(self, body: Any) -> None:
        cls = type(self)
        with cls.lock:
            token = self.headers.get("Authorization")
            cls.requests.append({"path": self.path, "token": token, "body": body, "began": time.monotonic()})
            how = cls.behaviours.pop(0) if len(cls.behaviours) > 1 else cls.behaviours[0]
        time.sleep(how.get("sleep", 0))
        getattr(self, "_" + how["do"])(how, body)

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _compute(self, how: dict[str, Any], body: Any) -> None:
        self.answer(json.dumps({"rewards": [float(prompt) for prompt in body["prompts"]]}).encode())

    def _chat(self, how: dict[str, Any], body: Any) -> None:
        """An OpenAI-style answer: `one` or `two`, by the number of pictures; a list gives each pass its own."""
        pictures = sum(part["type"] == "image_url" for part in body["messages"][0]["content"])
        text = how.get("one" if pictures == 1 else "two")
        texts = text if isinstance(text, list) else [text] * body.get("n", 1)
        choices: list[dict[str, Any]] = [{"message": {"role": "assistant", "content": t}} for t in texts]
        for choice in choices if "top_logprobs" in how else []:
            likely = [{"token": token, "logprob": value} for token, value in how["top_logprobs"].items()]
            choice["logprobs"] = {"content": [{"token": likely[0]["token"], "top_logprobs": likely}]}
        self.answer(json.dumps({"choices": choices}).encode())

    def _status(self, how: dict[str, Any], body: Any) -> None:
        self.answer(b'{"error": "as you wish"}', how["status"], how.get("headers"))

    def _body(self, how: dict[str, Any], body: Any) -> None:
        content = how["body"].encode() + b" " * how.get("blanks", 0)
        packing = how.get("packing")
        if packing is not None:
            content = gzip.compress(content) if packing == "gzip" else zlib.compress(content)
        self.answer(content, how.get("status", 200), {} if packing is None else {"Content-Encoding": packing})

    def _truncate(self, how: dict[str, Any], body: Any) -> None:
        self.answer(b'{"rewards": [0.', headers={"Content-Length": "100"})
        self.close_connection = True

    def _reset(self, how: dict[str, Any], body: Any) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _hang(self, how: dict[str, Any], body: Any) -> None:
        time.sleep(3600)


class _Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Callers hang up here as a matter of course."""


if __name__ == "__main__":
    with _Server(("127.0.0.1", int(sys.argv[1])), _Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()

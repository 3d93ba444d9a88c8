"""A server that answers as it is told to: what other servers do, and what goes wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OTHER = {"id": "other", "object": "model"}
OURS = {**OTHER, "id": "ours", "blockdiff": {"diffusion": True, "context_length": 64, "max_tokens": 64, "chat": True}}


def chat_chunk(text: str | None, reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n".encode()


DONE = b"data: [DONE]\n\n"


@dataclass
class Stub:
    """replies: to the posts one after the other, the last one again and again: pieces of a stream, or (status, body);
    slow: seconds between pieces; seen: (path, headers, body) of each request; hung_up: posts whose reader went away."""

    models: Any = field(default_factory=lambda: [OTHER])
    replies: list[list[bytes] | tuple[int, Any]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    slow: float = 0.0
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)

    @property
    def bodies(self) -> list[Any]:
        return [body for _, _, body in self.seen if body is not None]

    def start(self) -> Iterator[Stub]:
        handler = type("Handler", (_Handler,), {"stub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield self
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stub: Stub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.stub.seen.append((self.path, dict(self.headers), None))
        models = self.stub.models
        status, body = models if isinstance(models, tuple) else (200, {"object": "list", "data": models})
        self._whole(status, body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.seen.append((self.path, dict(self.headers), body))
        replies = self.stub.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if isinstance(reply, tuple):
            self._whole(*reply)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for piece in reply:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                time.sleep(self.stub.slow)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.stub.hung_up.set()
            self.close_connection = True

    def _whole(self, status: int, body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in self.stub.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

"""The server under faults: clients that leave, never read or send rubbish, signals, and its own limits."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import Server, parsed, serving
from starlette.testclient import TestClient

PROMPT = "the cat sat on"
LONG: dict[str, Any] = {  # many forwards, and so hot that the end token is as rare as any other
    "prompt": PROMPT,
    "max_tokens": 120,
    "temperature": 10.0,
    "seed": 1,
    "diffusion": {"block_size": 8, "policy": "random + reverse(steps=3000)"},
}


@pytest.fixture(scope="module")
def hasty(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with little patience."""
    options = ("--timeout", "3", "--keep-alive", "0.2", "--body-timeout", "1")
    with serving(trained / "checkpoint", tmp_path_factory.mktemp("hasty"), *options) as running:
        yield running


class Stream:
    """A stream that has begun."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        data = json.dumps({**body, "stream": True})
        self._connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        self.answer = self._connection.getresponse()
        if self.answer.status != 200:
            self._connection.close()
            raise AssertionError(self.answer.status)

    def line(self) -> bytes:
        return self.answer.readline()

    def rest(self) -> str:
        return self.answer.read().decode()

    def leave(self) -> None:
        self.answer.close()
        self._connection.close()


@contextmanager
def opened(server: Server, body: dict[str, Any]) -> Iterator[Stream]:
    """A stream; the client goes away at the end."""
    stream = Stream(server, body)
    try:
        yield stream
    finally:
        stream.leave()


def events_of(text: str) -> list[tuple[str, Any]]:
    return [event for block in text.split("\n\n") if (event := parsed(block)) is not None]


def lets_nobody_in(server: Server, seconds: float = 10.0) -> bool:
    """Whether new connections come to be refused in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=5).close()
        except OSError:
            return True
        time.sleep(0.05)
    return False


def headed(size: int) -> bytes:
    """The head of a request with a body of so many bytes."""
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*lines, f"Content-Length: {size}", "", ""]).encode()


def test_a_client_that_leaves_frees_its_text(server: Server):
    assert server.settled("running", 0)
    for streamed in (True, False):
        before = server.metric("forwards")
        if streamed:
            leave = Stream(server, LONG).leave
        else:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(LONG), {"Content-Type": "application/json"})
            leave = connection.close
        assert server.settled("running", 1)
        leave()
        assert server.settled("running", 0)
        assert server.settled("pages_in_use", 0)
        steps = server.metric("iterations")
        time.sleep(0.3)
        assert server.metric("iterations") == steps  # nothing is computed for nobody
        assert server.settled("running", 0)
        assert 0 < server.metric("forwards") - before < 3000  # what was computed for it is counted


def test_a_client_that_leaves_at_once_leaves_nothing(server: Server):
    """Gone before the stream has begun, at any moment of it: no place stays taken."""
    for pause in (0.0, 0.001, 0.002, 0.005, 0.01, 0.02) * 4:
        data = json.dumps({**LONG, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(headed(len(data)) + data)
            time.sleep(pause)
    assert server.settled("running", 0)
    assert server.settled("waiting", 0)
    assert server.settled("pages_in_use", 0)
    assert server.settled("open_requests", 0)


def test_a_text_is_freed_within_one_step(trained: Path):
    """Asked of the worker itself: after `end` the engine makes no step for that text."""
    import asyncio

    import blockdiff
    from blockdiff.engine import Engine, Limits, Request
    from blockdiff.serve.worker import Done, Ticket, Worker

    model = blockdiff.load(trained / "checkpoint")
    steps = []

    class Counted(Engine):
        def step(self) -> Any:
            steps.append(self.running)
            return super().step()

    async def run() -> None:
        worker = Worker(lambda: Counted(model, Limits(pages=64)))
        worker.start()
        events: list[Any] = []
        request = Request(prompt=tuple(model.encode(PROMPT)), max_new_tokens=100, block_size=4)
        ticket = Ticket(request, events.append, False, False)
        worker.submit([ticket])
        while not events:
            await asyncio.sleep(0.001)
        worker.cancel([ticket])
        asked_at = len(steps)
        while not any(isinstance(event, Done) for event in events):
            await asyncio.sleep(0.001)
        assert len(steps) <= asked_at + 1
        assert worker.engine.pages.in_use == 0
        worker.stop()

    asyncio.run(run())


def test_a_client_that_never_reads_holds_nothing(trained: Path, tmp_path: Path):
    options = {"block_size": 8, "policy": "first_hitting", "stream_drafts": True}
    body = {**LONG, "n": 8, "diffusion": options, "stream": True}
    with serving(trained / "checkpoint", tmp_path) as server:
        data = json.dumps(body).encode()
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", server.port))
            deaf.sendall(headed(len(data)) + data)
            assert server.settled("texts", 8, seconds=60)  # they end although nobody takes them
            assert server.settled("pages_in_use", 0)
            assert server.text(PROMPT, max_tokens=8) is not None
        assert server.stop() == 0


def test_a_very_large_body_is_refused(server: Server):
    for size in (2 * 2**20, 100 * 2**20):
        status, answer, headers = server.post("/v1/completions", b"x" * size)
        assert (status, answer["error"]["code"]) == (413, "too_large")
        assert headers["connection"] == "close"
    chunks = (b"x" * 65536 for _ in range(64))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", chunks, {"Content-Type": "application/json"})  # no length told
    assert connection.getresponse().status == 413
    connection.close()


def test_a_body_that_never_comes(hasty: Server):
    """Only the length is told; the server waits for a while, and others are answered meanwhile."""
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=60) as slow:
        slow.sendall(headed(50) + b"{")
        assert hasty.text(PROMPT, max_tokens=4) is not None
        assert slow.recv(65536).startswith(b"HTTP/1.1 408")


RUBBISH = [
    b"",
    b"{",
    b"null",
    b'"x"',
    b"\xff\xfe\x00",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "stop": "\\udfff"}',
    b"[" * 100_000,
    b'{"a":' * 5000,
    b'{"prompt":"a","max_tokens":' + b"9" * 6000 + b"}",
    b'{"prompt":"a","temperature":NaN}',
    b'{"prompt":"a","temperature":-Infinity}',
    b'{"prompt":"a","temperature":1e999}',
]


@pytest.mark.parametrize("body", RUBBISH, ids=lambda body: repr(body[:20]))
def test_rubbish_is_a_clear_400(server: Server, body: bytes):
    status, answer, _ = server.post("/v1/completions", body)
    assert status == 400, answer
    assert answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_odd_but_possible_requests_are_answered(server: Server):
    for body in (
        {"prompt": "a\x00b\u202e\ufeff", "max_tokens": 4},
        {"prompt": "", "max_tokens": 2},
        {"prompt": "a", "seed": 2**63 - 1, "n": 3, "max_tokens": 2},
        {"prompt": "a", "seed": -(2**63), "max_tokens": 2},
        {"prompt": "a", "temperature": 1e-300, "top_p": 1e-300, "max_tokens": 2},
        {"prompt": "a", "temperature": 100, "max_tokens": 4},
    ):
        status, answer, _ = server.post("/v1/completions", body)
        assert status == 200, answer


def test_a_body_of_another_kind_says_so(server: Server):
    status, answer, _ = server.post("/v1/completions", b'{"prompt": "a"}', Content_Type="text/plain")
    assert (status, "application/json" in answer["error"]["message"]) == (400, True)


def test_too_many_texts_are_told_to_come_back(trained: Path, tmp_path: Path):
    with serving(trained / "checkpoint", tmp_path, "--running", "2", "--waiting", "2") as narrow:
        with ExitStack() as streams:
            for _ in range(4):
                streams.enter_context(opened(narrow, LONG))
            assert narrow.settled("running", 2)
            assert narrow.settled("waiting", 2)
            status, answer, headers = narrow.post("/v1/completions", {"prompt": PROMPT})
            assert (status, answer["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(headers["retry-after"]) <= 60
            assert "x-should-retry" not in headers
        assert narrow.settled("running", 0)
        assert narrow.text(PROMPT, max_tokens=4) is not None


def test_a_request_that_takes_too_long_ends_with_what_it_has(hasty: Server):
    """Many short blocks: some are written in time on any machine, and all of them on none."""
    body = {**LONG, "diffusion": {"block_size": 2, "policy": "random + reverse(steps=1000)"}}
    answer = hasty.complete(**body)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 0 < answer["usage"]["completion_tokens"] < 120
    assert "may take 3 s" in answer["usage"]["diffusion"]["warnings"][-1]
    assert hasty.settled("pages_in_use", 0)


def test_silent_streams_are_kept_alive(hasty: Server):
    with opened(hasty, LONG) as stream:
        text = stream.rest()
    assert [block for block in text.split("\n\n") if block.startswith(": keep-alive")]
    assert events_of(text)[-1] == ("", "[DONE]")


def test_killed_and_started_again(trained: Path, tmp_path: Path):
    model = trained / "checkpoint"
    with serving(model, tmp_path) as server:
        before = server.text(PROMPT, max_tokens=12, seed=3)
        with opened(server, LONG) as stream:
            stream.line()
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
            with pytest.raises((http.client.HTTPException, OSError)):
                stream.rest()
        with serving(model, tmp_path, port=server.port) as again:
            assert again.text(PROMPT, max_tokens=12, seed=3) == before


def test_a_stop_lets_running_requests_finish(trained: Path, tmp_path: Path):
    body = {**LONG, "seed": 4, "diffusion": {"block_size": 8, "policy": "random + reverse(steps=30)"}}
    with serving(trained / "checkpoint", tmp_path) as server:
        alone = server.text(**body)
        with ThreadPoolExecutor(2) as pool, opened(server, body) as stream:
            whole = pool.submit(server.text, **body)
            assert server.settled("running", 2)
            server.process.send_signal(signal.SIGTERM)
            assert lets_nobody_in(server)
            events = events_of(stream.rest())
            assert whole.result(60) == alone
        assert events[-1] == ("", "[DONE]")
        assert "".join(data["choices"][0]["text"] for _, data in events[:-1]) == alone
        assert server.process.wait(30) == 0


def test_a_stop_returns_what_does_not_finish_in_time(trained: Path, tmp_path: Path):
    body = {**LONG, "diffusion": {"block_size": 4, "policy": "random + reverse(steps=300)"}}
    told = {**body, "stream_options": {"include_usage": True}}
    with (
        serving(trained / "checkpoint", tmp_path, "--grace", "1") as server,
        ThreadPoolExecutor(1) as pool,
        opened(server, told) as stream,
    ):
        whole = pool.submit(server.complete, **body)
        assert server.settled("running", 2)
        server.process.send_signal(signal.SIGTERM)
        events = events_of(stream.rest())
        assert events[-1] == ("", "[DONE]")
        assert events[-3][1]["choices"][0]["finish_reason"] == "length"
        for usage in (events[-2][1]["usage"], whole.result(30)["usage"]):
            assert "the server stops" in usage["diffusion"]["warnings"][-1]
            assert usage["completion_tokens"] < 120
        assert server.process.wait(30) == 0


def test_an_engine_that_fails_is_told_and_replaced(trained: Path):
    """The one 5xx there is: a fault of ours. The next request is served."""
    import blockdiff
    from blockdiff.engine import Engine, Limits
    from blockdiff.serve.app import Application
    from blockdiff.serve.settings import Settings

    model = blockdiff.load(trained / "checkpoint")
    app = Application(model, Settings(name="tiny"), Limits(pages=64))
    broken = threading.Event()

    def step(engine: Engine) -> Any:
        if broken.is_set():
            broken.clear()
            raise RuntimeError("a fault")
        return original(engine)

    original, Engine.step = Engine.step, step  # type: ignore[method-assign]
    try:
        with TestClient(app) as client:
            body = {"prompt": PROMPT, "max_tokens": 8, "seed": 1}
            whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            broken.set()
            failed = client.post("/v1/completions", json=body)
            assert failed.status_code == 500
            assert failed.json()["error"]["code"] == "engine_fault"
            assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == whole
            broken.set()
            stream = client.post("/v1/completions", json={**body, "stream": True}).text
            assert "engine_fault" in stream
            assert "[DONE]" not in stream
    finally:
        Engine.step = original  # type: ignore[method-assign]


def test_an_engine_whose_thread_ends_lets_nobody_wait(trained: Path, monkeypatch: pytest.MonkeyPatch):
    import blockdiff
    from blockdiff.engine import Limits
    from blockdiff.serve.app import Application
    from blockdiff.serve.settings import Settings
    from blockdiff.serve.worker import Worker

    app = Application(blockdiff.load(trained / "checkpoint"), Settings(name="tiny"), Limits(pages=64))
    told = threading.Event()
    app.worker.on_death = told.set
    with TestClient(app) as client:
        body = {"prompt": PROMPT, "max_tokens": 8}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert client.get("/health").status_code == 200

        def fault(worker: Worker, tickets: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(Worker, "_add", fault)
        answer = client.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_fault")
        assert told.wait(30)  # the process ends then, to be started anew
        assert client.post("/v1/completions", json=body).status_code == 503
        assert client.get("/health").status_code == 503


def test_a_request_that_never_gets_a_place_is_told_to_come_back(trained: Path, monkeypatch: pytest.MonkeyPatch):
    import blockdiff
    from blockdiff.engine import Engine, Limits
    from blockdiff.serve.app import Application
    from blockdiff.serve.settings import Settings

    app = Application(blockdiff.load(trained / "checkpoint"), Settings(name="tiny", timeout=2), Limits(pages=64))
    with TestClient(app) as client:
        body = {"prompt": PROMPT, "max_tokens": 8}
        assert client.post("/v1/completions", json=body).status_code == 200
        monkeypatch.setattr(Engine, "step", lambda self: time.sleep(0.02) or [])  # busy with others for ever
        answer = client.post("/v1/completions", json=body)
        assert (answer.status_code, "too busy to begin" in answer.json()["error"]["message"]) == (429, True)
        assert int(answer.headers["retry-after"]) >= 1
        stream = client.post("/v1/completions", json={**body, "stream": True}).text
        assert "too busy to begin" in stream
        assert "rate_limit_error" in stream
        assert "[DONE]" not in stream


def test_a_taken_port_and_bad_options_are_one_line(
    server: Server, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from test_cli import run

    model = str(trained / "checkpoint")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    for options, says in (
        (["--port", str(server.port)], "Address already in use"),
        (["--chat-template", str(tmp_path / "none")], "--chat-template"),
        (["--chat-template", str(tmp_path / "bad.jinja")], "--chat-template"),
        (["--api-key", "ключ"], "--api-key"),
        (["--timeout", "0"], "timeout"),
        (["--grace", "inf"], "grace"),
        (["--keep-alive", "nan"], "keep_alive"),
        (["--cache-tokens", "8"], "memory holds"),
    ):
        port = [] if "--port" in options else ["--port", "0"]
        code, _, error = run("serve", model, *port, *options, capsys=capsys)
        assert code in (1, 2), options
        assert says in error
        assert len(error.strip().splitlines()) == 1

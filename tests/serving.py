"""A real server in a process of its own, for the tests of what talks to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Server:
    """A running `blockdiff serve`; its output is in `log`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        self.url = self._address()
        self.port = int(self.url.rpartition(":")[2])

    def _address(self) -> str:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            text = self.log.read_text()
            if found := re.search(r" at (http://\S+) ", text):
                return found.group(1)
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {text}")
            time.sleep(0.05)
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, parsed answer (text where it is no JSON) and headers (names in lower case)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kinds = {"Content-Type": "application/json", **{key.replace("_", "-"): value for key, value in headers.items()}}
        try:
            connection.request(method, path, data, kinds)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        found = {key.lower(): value for key, value in answer.getheaders()}
        return answer.status, json.loads(text) if text[:1] in ("{", "[") else text, found

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self.call("POST", path, body, **headers)

    def complete(self, prompt: Any, **fields: Any) -> Any:
        """The answer of /v1/completions, which must be one."""
        status, answer, _ = self.post("/v1/completions", {"prompt": prompt, **fields})
        assert status == 200, answer
        return answer

    def text(self, prompt: Any, **fields: Any) -> str:
        return str(self.complete(prompt, **fields)["choices"][0]["text"])

    def metric(self, name: str) -> float:
        """A number of /metrics, summed over its labels."""
        _, page, _ = self.call("GET", "/metrics")
        lines = re.findall(rf"^blockdiff_{name}(?:_total)?(?:\{{[^}}]*\}})? (\S+)$", page, re.M)
        assert lines, name
        return sum(map(float, lines))

    def settled(self, name: str, value: float, seconds: float = 10.0) -> bool:
        """Whether a number of /metrics gets to a value in time."""
        deadline = time.monotonic() + seconds
        while self.metric(name) != value:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def serving(model: Path, folder: Path, *options: str, port: int = 0, **environment: str) -> Iterator[Server]:
    """A server of a model directory. Output goes to a new file in `folder`."""
    number = len(list(folder.glob("serve*.log")))
    log = folder / f"serve{number}.log"
    command = [sys.executable, "-m", "blockdiff", "serve", str(model), "--port", str(port), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment})
    server = None
    try:
        server = Server(process, log)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def streamed(server: Server, path: str, body: dict[str, Any]) -> list[tuple[str, Any]]:
    """All events of a stream: (name, parsed data)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    assert answer.status == 200, text
    return [event for block in text.split("\n\n") if (event := parsed(block)) is not None]


def parsed(block: str) -> tuple[str, Any] | None:
    """One event of a stream; None for a comment."""
    name, data = "", []
    for line in block.splitlines():
        if line.startswith("event:"):
            name = line[6:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].strip())
    if not data:
        return None
    return name, data[0] if data[0] == "[DONE]" else json.loads("\n".join(data))

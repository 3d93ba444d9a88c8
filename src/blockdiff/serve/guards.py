"""What stands before the application: who may ask, from where, and how much."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blockdiff.serve.settings import Settings

OPEN_PATHS = {"/", "/page.css", "/page.js", "/favicon.ico", "/health"}
HEADER_BYTES = 32 * 1024
_DISCARD_SECONDS = 5.0
Tell = Callable[[str, str, int, float], None]


def error_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def problem(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error as an answer. A client is not to send the same again, unless it is told when."""
    retry = {} if status in (429, 503) else {"x-should-retry": "false"}
    return JSONResponse(error_of(status, message, param, code), status, headers={**retry, **(headers or {})})


class Guards:
    """ASGI middleware: refuses unknown hosts and keys, and bodies that are too large or too slow, before the
    application sees them. A body is read whole, so that the application never waits for a client.

    tell is called with method, path, status and seconds of every request (status 499: the client went away)."""

    def __init__(self, app: ASGIApp, settings: Settings, tell: Tell) -> None:
        self.app, self.settings, self._tell = app, settings, tell
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, counted)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            self._tell(scope["method"], scope["path"], status, time.perf_counter() - began)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["raw_path"]) > HEADER_BYTES:
            too_much = problem(431, f"the headers are larger than {HEADER_BYTES} bytes", code="too_large")
            await too_much(scope, receive, send)
            return
        refused = self._refused(scope["path"], headers)
        body = b""
        if refused is None:
            body, refused = await self._body(headers, receive)
        if refused is not None:
            await refused(scope, receive, send)
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _refused(self, path: str, headers: Headers) -> JSONResponse | None:
        if "content-length" in headers and "transfer-encoding" in headers:
            return problem(400, "Content-Length and Transfer-Encoding say two things; send one of them")
        if self.settings.hosts and _host(headers.get("host", "")) not in self.settings.hosts:
            return problem(400, "this Host is not served here (blockdiff serve --allow-host)", code="unknown_host")
        if not self._keys or path in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        if kind.lower() == "bearer" and any(matches):
            return None
        said = "this API key is not known" if given else "give the API key: Authorization: Bearer KEY"
        return problem(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: Headers, receive: Receive) -> tuple[bytes, JSONResponse | None]:
        """The request's body, or what it is refused with."""
        most = self.settings.body_bytes
        told = headers.get("content-length", "0")
        too_large = told.isdigit() and int(told) > most
        parts: list[bytes] = []
        size, deadline = 0, time.monotonic() + self.settings.body_seconds
        if too_large:  # read on for a while, since a client may only listen when it has sent all
            deadline = time.monotonic() + _DISCARD_SECONDS
        while True:
            message = await _before(deadline, receive)
            if message is None and too_large:
                break
            if message is None:
                text = f"the body did not arrive within {self.settings.body_seconds:g} s"
                return b"", problem(408, text, code="timeout", headers={"Connection": "close"})
            if message["type"] != "http.request":
                return b"", problem(400, "the client went away")
            size += len(message.get("body", b""))
            if size > most and not too_large:
                too_large, deadline = True, time.monotonic() + _DISCARD_SECONDS
            if not too_large:
                parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        if too_large:
            text = f"the body is larger than the {most} bytes that this server takes"
            return b"", problem(413, text, code="too_large", headers={"Connection": "close"})
        return b"".join(parts), None


async def _before(deadline: float, receive: Callable[[], Awaitable[Any]]) -> Any:
    """What is received before a time; None where that passes first."""
    try:
        async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
            return await receive()
    except TimeoutError:
        return None


def _host(value: str) -> str:
    """The name in a Host header, without the port."""
    name = value.rsplit(":", 1)[0] if value.rpartition(":")[2].isdigit() else value
    return name.lower()

"""A small HTTP client for OpenAI-compatible servers: JSON, and server-sent events as they come.

The standard library's own: which HTTP package transformers brings along changes between the versions that we support.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from blockdiff.chat.printable import one_line

_LONGEST = 1 << 24  # bytes of one line of a stream, or of a whole answer
_TOO_LONG = re.compile(rb"context_length_exceeded|exceed_context_size|context (length|size|window)", re.I)
_QUIET = 600.0  # seconds that a stream may say nothing
_QUICK = 30.0  # seconds that anything else may take


class TooLong(ValueError):
    """A server's refusal of a prompt, or of a prompt and its max_tokens, that the model's context does not hold."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key and the conversation to somebody else."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Client:
    """url: scheme, host and path, with or without the final /v1. Raises ValueError for a URL or key that is none.

    Its methods raise ValueError for what the server refuses, OSError where it is not reached or fails.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.base = _base(url)
        if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
            raise ValueError("the API key holds blanks or characters that no key has; give it without them")
        self._key = key
        self._opener = urllib.request.build_opener(_NoRedirect())

    def get(self, path: str) -> Any:
        """The JSON at a path; None where the server has nothing there (404), or fails to say what (500)."""
        with self._errors():
            try:
                with self._opener.open(self._request(path), timeout=_QUICK) as response:
                    body = response.read(_LONGEST)
            except urllib.error.HTTPError as error:
                if error.code not in (404, 500):
                    raise
                error.close()
                return None
        try:
            return json.loads(body)
        except ValueError:
            raise ValueError(f"{self.base}{path}: sends no JSON; is this an OpenAI-compatible server?") from None

    def stream(self, path: str, body: Any) -> Generator[tuple[str, str]]:
        """Send JSON; yields the events (name, data) of the answer. Closing the generator closes the connection."""
        with self._errors(), self._opener.open(self._request(path, body), timeout=_QUIET) as response:
            if (kind := response.headers.get_content_type()) != "text/event-stream":
                raise ValueError(f"{self.base}{path}: answers with {one_line(kind)} and not with a stream of events")
            yield from events(iter(lambda: response.read1(1 << 16), b""))

    def _request(self, path: str, body: Any = None) -> urllib.request.Request:
        headers = {"Accept": "application/json" if body is None else "text/event-stream"}
        headers |= {} if body is None else {"Content-Type": "application/json"}
        headers |= {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        return urllib.request.Request(self.base + path, None if body is None else json.dumps(body).encode(), headers)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What goes wrong inside, as one line."""
        try:
            yield
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except urllib.error.URLError as error:
            raise ConnectionError(f"{self.base}: no server answers there ({_reason(error.reason)})") from None
        except (http.client.HTTPException, OSError) as error:
            raise ConnectionError(f"{self.base}: the connection broke off ({_reason(error)})") from None

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        try:
            body = error.read(1 << 16)
        except (http.client.HTTPException, OSError):
            body = b""
        said = message_of(body)
        told = f"{error.code}: {said}" if said else str(error.code)
        if error.code == 401:
            return ValueError(
                f"{self.base} wants an API key that it knows ({told}); give --api-key or BLOCKDIFF_API_KEY"
            )
        if error.code in (429, 503):
            after = one_line(error.headers.get("Retry-After") or "")
            return ConnectionError(f"{self.base} is busy ({told}); try again {f'in {after} s' if after else 'later'}")
        if 300 <= error.code < 400:
            where = one_line(error.headers.get("Location") or "elsewhere")
            return ValueError(f"{self.base} sends on to {where} ({error.code}); give that address itself")
        if error.code >= 500:
            return ConnectionError(f"{self.base} failed ({told})")
        too_long = _TOO_LONG.search(body) is not None
        return (TooLong if too_long else ValueError)(f"{self.base} refuses this ({told})")


def message_of(body: bytes | str) -> str:
    """What an error's body says, in one line: the message of OpenAI's form, or else how the text begins."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        found = json.loads(text)
    except ValueError:
        return one_line(text)
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return one_line(found if isinstance(found, str) else json.dumps(found) if found else "")


def events(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Server-sent events (name, data) from bytes that may be cut anywhere; comments are left out, and so is an event
    that never ended. After the WHATWG's HTML standard, section 9.2.6."""
    name = ""
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield name, "\n".join(data)
            name, data = "", []
            continue
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if key == "event":
            name = value
        elif key == "data":
            data.append(value)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines without their ends, each as soon as it is certain that it ended: CR, LF, or both, which may come apart."""
    rest, first = b"", True
    for chunk in chunks:
        lines = (rest + chunk).splitlines(keepends=True)
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        for line in lines:
            text = line.rstrip(b"\r\n").decode(errors="replace")
            yield text.removeprefix("\ufeff") if first else text
            first = False
        if len(rest) > _LONGEST:
            raise ConnectionError("the stream sends a line without an end")


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        fits = bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fits = False
    if not fits or parts.username is not None or parts.query or parts.fragment or not url.isprintable() or " " in url:
        raise ValueError(f"{one_line(url)}: no address of a server; give one like http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _reason(error: Any) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return one_line(text)

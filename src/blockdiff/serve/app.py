"""The application: routes in OpenAI's shapes over one engine, and one page to try it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from blockdiff import __version__
from blockdiff.api import Model
from blockdiff.engine import Engine, Limits
from blockdiff.serve.capabilities import capabilities
from blockdiff.serve.desk import Desk, Visit
from blockdiff.serve.fields import ChatBody, CompletionBody, LoadBody
from blockdiff.serve.guards import OPEN_PATHS, Guards, problem
from blockdiff.serve.metrics import Metrics
from blockdiff.serve.orders import Clerk, Order, Refused
from blockdiff.serve.settings import Settings
from blockdiff.serve.worker import Worker

log = logging.getLogger("blockdiff.serve")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PAGES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": says, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for status, says in {
        400: "the request cannot be honoured; the field is named",
        401: "no API key, or an unknown one",
        404: "this model is not served here",
        408: "the body did not arrive in time",
        413: "the body is too large",
        431: "the headers are too large",
        429: "every place is taken; see Retry-After",
        500: "the engine failed",
        503: "the server is stopping",
    }.items()
}


_ALTERNATIVES = {
    "prompt": "give a text, a list of texts, token ids, or a list of those",
    "stop": "give a text of 1 to 500 characters, or a list of such",
    "content": "give a text, or a list of parts with type text",
}


class Application(FastAPI):
    """The app, its engine's worker and its desk."""

    def __init__(self, model: Model, settings: Settings, limits: Limits) -> None:
        self.settings = settings
        self.worker = Worker(lambda: Engine(model, limits), settings.threads)
        self.desk = Desk(self.worker, settings, Metrics(self.worker))
        self.clerk = Clerk(model, self.worker.check, settings)
        self.about = capabilities(model, self.worker.check, settings)
        super().__init__(
            title="blockdiff",
            version=__version__,
            lifespan=_lifespan,
            docs_url=None,  # its page asks other hosts
            redoc_url=None,
            redirect_slashes=False,  # it would tell an address of its own making
            responses=_ERRORS,
        )
        self.add_middleware(Guards, settings=settings, tell=self._tell)
        if settings.origins:
            self.add_middleware(
                CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )
        self.add_exception_handler(Refused, _refused)
        self.add_exception_handler(RequestValidationError, _invalid)
        self.add_exception_handler(HTTPException, _http_error)
        self.add_exception_handler(Exception, _fault)
        _add_routes(self)

    def _tell(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count and log a request. Paths of others' making are no labels, and cannot break a line of the log."""
        known = path in {getattr(route, "path", "") for route in self.routes}
        self.desk.metrics.requests.labels(path if known else "other", str(status)).inc()
        level = logging.DEBUG if path in OPEN_PATHS or path == "/metrics" else logging.INFO
        log.log(level, "%s %s %d %.3f s", method, path if known else repr(path[:80]), status, seconds)

    def openapi(self) -> dict[str, Any]:
        """FastAPI's description, with our shape of errors in place of its own."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for route in schema["paths"].values():
                for operation in route.values():
                    operation["responses"].pop("422", None)
            parts = schema["components"]["schemas"]
            for own in ("HTTPValidationError", "ValidationError"):
                parts.pop(own, None)
            text = {"type": "string"}
            either = {"anyOf": [text, {"type": "null"}]}
            error = {"message": text, "type": text, "param": either, "code": either}
            inner = {"type": "object", "properties": error, "required": list(error)}
            parts["Problem"] = {"type": "object", "properties": {"error": inner}, "required": ["error"]}
        return self.openapi_schema or {}


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    assert isinstance(app, Application)
    app.worker.start()
    yield
    app.worker.stop()


def _add_routes(app: Application) -> None:
    name, created = app.settings.name, int(time.time())
    entry = {"id": name, "object": "model", "created": created, "owned_by": "blockdiff", "blockdiff": app.about}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        if model != name:
            raise Refused(f"this model is not served here; this server has {name}", status=404, code="model_not_found")
        return entry

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, http: Request) -> Response | dict[str, Any]:
        return await _answer(app, http, lambda: app.clerk.completion(body))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, http: Request) -> Response | dict[str, Any]:
        return await _answer(app, http, lambda: app.clerk.chat(body))

    @app.post("/load_model", response_model=None)
    async def load_model(body: LoadBody) -> EventSourceResponse:
        """What `transformers chat` asks for before it begins: this model is loaded, and no other can be."""
        if body.model != name:
            raise Refused(f"this server has {name} and loads no other model", "model", status=404)

        async def events() -> AsyncIterator[ServerSentEvent]:
            yield ServerSentEvent('{"status": "ready", "cached": true}', sep="\n")

        return EventSourceResponse(events(), sep="\n", ping=0)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        if app.desk.stopping or app.worker.died:
            return problem(503, "the server is stopping", code="stopping")
        return Response('{"status":"ok"}', media_type="application/json")

    @app.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return Response(status_code=204)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(app.desk.metrics.page(), media_type="text/plain; version=0.0.4")

    for path, (file, kind) in _PAGES.items():
        content = (resources.files("blockdiff.serve") / "static" / file).read_bytes()
        app.add_api_route(path, _page(content, kind), include_in_schema=False, methods=["GET", "HEAD"])


def _page(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=_PAGE_HEADERS)

    return page


async def _answer(app: Application, http: Request, read: Callable[[], Order]) -> Response | dict[str, Any]:
    """Read the body's order, have it written, and answer as it asks."""
    app.desk.look(1)  # before anything is computed
    order = await run_in_threadpool(read)
    visit = app.desk.open(order)
    if order.stream:
        return _Stream(visit)
    answer = await visit.whole(http)
    return Response(status_code=499) if answer is None else answer


class _Stream(EventSourceResponse):
    """A visit's stream. However it ends, before it has begun too, the visit is closed."""

    def __init__(self, visit: Visit) -> None:
        settings = visit.desk.settings
        super().__init__(
            visit.stream(),
            sep="\n",
            ping=settings.keep_alive,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            send_timeout=settings.send_seconds,
        )
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("a client took nothing for %g s and was given up", self.send_timeout)
        finally:
            self._visit.desk.close(self._visit)


def _refused(http: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": str(error.wait)} if error.wait else {}
    return problem(error.status, error.message, param=error.param, code=error.code, headers=headers)


def _invalid(http: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, and where."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = _param(first["loc"])
    says = str(first["msg"])
    if len(first["loc"]) > 1 and first["type"] != "extra_forbidden" and _is_alternative(first["loc"][-1]):
        says = _ALTERNATIVES.get((param or "").rpartition(".")[2], says)
    if first["type"] == "json_invalid":
        return problem(400, f"the body is no JSON ({first.get('ctx', {}).get('error', 'it cannot be read')})")
    if param is None and "json" not in http.headers.get("content-type", ""):
        return problem(400, "send the body as JSON, with the header Content-Type: application/json")
    if first["type"] == "extra_forbidden":
        says = "is not a field that this server knows"
    return problem(400, f"{param or 'body'}: {says[:1].lower() + says[1:]}", param=param)


def _param(loc: tuple[str | int, ...]) -> str | None:
    """The field of an error, as a client would write it; the names of alternatives are no part of it."""
    path = ""
    for part in loc[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _is_alternative(part):
            break
        else:
            path += f".{part}" if path else part
    return path or None


def _fault(http: Request, error: Exception) -> Response:
    return problem(500, f"a fault of the server ({type(error).__name__}); it is in its log", code="fault")


def _is_alternative(part: str | int) -> bool:
    """Whether a part of an error's place is pydantic's name for one of several allowed types."""
    return isinstance(part, str) and (part in ("str", "int", "constrained-str") or "[" in part)


def _http_error(http: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), str(getattr(error, "detail", ""))
    if status == 400:  # FastAPI's only one of its own
        detail = "the body cannot be read as JSON in UTF-8"
    return problem(status, detail, headers=getattr(error, "headers", None))

"""Running the application: a socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from sse_starlette.sse import AppStatus

from blockdiff.serve.app import Application
from blockdiff.serve.guards import HEADER_BYTES

_DEAF_SECONDS = 600
_END_SECONDS = 5  # for what was ended to be sent


def listen_on(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError where the address is taken or unknown.

    Connections whose client takes nothing for ten minutes are dropped by the kernel, where it can.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=1024)
    # asyncio does so for sockets that name their protocol, and this one does not; without it the second piece of an
    # answer waits for the client's acknowledgement, 40 ms on a connection that is kept
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAF_SECONDS * 1000)
    return listening


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready and tells the desk when it stops."""

    def __init__(self, config: uvicorn.Config, app: Application, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._ready = app, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.create_task(self._app.desk.stop())
        await super().shutdown(sockets)
        stopping.cancel()


def serve(app: Application, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; then finish what runs, within the time of grace. Calls `ready` when it answers.

    Raises OSError where the engine's thread ended by a fault: then the process is to be started anew.
    """
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # streams end when their texts do
    logging.getLogger("blockdiff.serve").setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        http="h11",  # it limits the size of headers
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=int(app.settings.grace) + _END_SECONDS,
    )
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has ended: then they say nothing
        signal.signal(number, _nothing)
    server = _Server(config, app, ready)
    app.worker.on_death = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listening])
    if app.worker.died:
        raise OSError("the engine ended by a fault of its own (see the log); start the server again")


def _nothing(number: int, frame: Any) -> None:
    pass

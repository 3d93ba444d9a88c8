"""`blockdiff serve`: the server, its options and what it says when it starts."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

import typer

from blockdiff.cli_options import ModelPath, load_model, out


def serve(
    path: ModelPath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any free one.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; default: its directory's.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask for this key; repeatable. Better in the environment.",
            envvar="BLOCKDIFF_API_KEY",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one text; 0: the model's context.", min=0)] = 0,
    largest_block: Annotated[
        int, typer.Option("--max-block-size", help="Largest block size; 0: the largest that training had.", min=0)
    ] = 0,
    running: Annotated[int, typer.Option(help="Texts written at once.", min=1)] = 64,
    waiting: Annotated[int, typer.Option(help="Texts that may wait; more are told to come back (429).", min=0)] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request ends with what it has.")] = 300.0,
    grace: Annotated[float, typer.Option(help="Seconds for running requests when the server stops.")] = 20.0,
    threads: Annotated[
        int, typer.Option(help="Threads of a pass; 0: one or all processors, whichever is faster.", min=0)
    ] = 0,
    keep_alive: Annotated[float, typer.Option(help="Seconds between comments in a silent stream.")] = 15.0,
    body_timeout: Annotated[float, typer.Option(help="Seconds for a request's body to arrive.")] = 20.0,
    cache_tokens: Annotated[
        int,
        typer.Option(help="Tokens of keys and values kept; 0: for all running texts, in a quarter of memory.", min=0),
    ] = 0,
    chat_template: Annotated[Path | None, typer.Option(help="File of a chat template (Jinja).")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that the Host header may have; repeatable.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call this server; repeatable; none by default.")
    ] = None,
    strict_coverage: Annotated[
        bool, typer.Option("--strict-coverage", help="Refuse what training does not cover, instead of warning.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and texts into the log.")] = False,
) -> None:
    """Serve a model over HTTP as OpenAI's clients expect it, with a page to try it."""
    missing = [name for name in ("fastapi", "uvicorn", "sse_starlette", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'blockdiff[serve]'")
    from blockdiff.engine import limits_in
    from blockdiff.runtime import free_memory
    from blockdiff.serve.app import Application
    from blockdiff.serve.listen import listen_on
    from blockdiff.serve.listen import serve as run
    from blockdiff.serve.settings import Settings

    settings = Settings(
        name=name or _name_of(path),
        api_keys=tuple(api_key or ()),
        max_tokens=max_tokens,
        largest_block=largest_block,
        threads=threads,
        running=running,
        waiting=waiting,
        timeout=timeout,
        grace=grace,
        keep_alive=keep_alive,
        body_seconds=body_timeout,
        hosts=_hosts(host, allow_host or ()),
        origins=tuple(cors_origin or ()),
        strict_coverage=strict_coverage,
        log_prompts=log_prompts,
    )
    with listen_on(host, port) as listening:  # before loading: a taken port is told at once
        model = load_model(path)
        if chat_template is not None:
            model.set_chat_template(chat_template)
        limits = limits_in(model, running, free_memory(model.device), cache_tokens)
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s")
        app = Application(model, settings, limits)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

        def ready() -> None:
            out.print(f"serving {settings.name} at {address} (the page; {address}/v1 for clients)")
            if not settings.api_keys and not _is_loopback(host):
                out.print("warning: everyone who reaches this address may use it: set BLOCKDIFF_API_KEY")
            out.file.flush()

        run(app, listening, ready)


def _hosts(host: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Names that the Host header may have: this machine's where only this machine is served, and those allowed; empty:
    any."""
    if not allowed and not _is_loopback(host):
        return ()
    own = ("localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host)
    return tuple(dict.fromkeys((*own, *(name.lower() for name in allowed))))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name_of(path: str) -> str:
    """The directory's name, or the run's where that is `checkpoint`; a hub name as it is."""
    where = Path(path)
    if not where.is_dir():
        return path
    where = where.resolve()
    return where.parent.name if where.name == "checkpoint" else where.name

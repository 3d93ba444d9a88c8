"""The command `chat`: a conversation in the terminal, with a model or with a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockdiff.cli_generate import ChosenPolicy, Temperature
from blockdiff.cli_options import BlockSize, Lossless, Seed, Threshold, err, load_model, out

if TYPE_CHECKING:
    from blockdiff.chat import Partner


def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_URL",
            help="Checkpoint directory, hub name, or the address of an OpenAI-compatible server (http://...).",
        ),
    ],
    policy: ChosenPolicy = None,
    block_size: BlockSize = None,
    threshold: Threshold = None,
    temperature: Temperature = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    seed: Seed = 0,
    lossless: Lossless = False,
    system: Annotated[str, typer.Option(help="What the model is told before the conversation.")] = "",
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file with the chat template, where the model brings none.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="BLOCKDIFF_API_KEY", help="Key of the server; better in the environment.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--model", help="Which of the server's models; default: its only.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue plain text instead of chatting.")] = False,
) -> None:
    """Talk to a model: of this machine, or of a server. Also reads lines from a pipe."""
    from blockdiff.chat import Conversation, Session, Settings
    from blockdiff.chat.screen import Screen

    settings = Settings(policy, block_size, threshold, temperature, max_new_tokens, seed, lossless)
    conversation = Conversation(system, plain=plain)
    screen = Screen(out, err)
    partner = _partner(model, chat_template, api_key, name, plain=plain, drafts=screen.live)
    partner.check(settings)
    Session(partner, conversation, settings, screen, interactive=sys.stdin.isatty()).run()


def _partner(
    model: str, chat_template: Path | None, key: str | None, name: str | None, *, plain: bool, drafts: bool
) -> Partner:
    if model.startswith(("http://", "https://")):
        from blockdiff.chat.client import Client
        from blockdiff.chat.remote import RemotePartner

        if chat_template is not None:
            raise ValueError("--chat-template: the template is the server's; give it to the server instead")
        return RemotePartner(Client(model, key), name, plain=plain, drafts=drafts)
    from blockdiff.chat.local import LocalPartner

    if name is not None:
        raise ValueError("--model chooses among the models of a server; here the argument names the model already")
    loaded = load_model(model)
    if chat_template is not None:
        loaded.set_chat_template(chat_template)
    return LocalPartner(loaded, model, plain=plain, drafts=drafts)

"""An OpenAI-compatible server as partner: `blockdiff serve`, or any other."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import closing
from typing import Any

from blockdiff.chat.client import Client, TooLong, message_of
from blockdiff.chat.conversation import Conversation, Settings
from blockdiff.chat.partner import Draft, End, Event, Text, full
from blockdiff.chat.printable import one_line


class RemotePartner:
    """name: of the model that answers; None: the server's only one. drafts: whether the open block is asked for, too.

    Raises ValueError for a server or model that cannot be talked to, OSError where none is reached.
    """

    def __init__(self, client: Client, name: str | None, *, plain: bool, drafts: bool) -> None:
        self.client, self.plain = client, plain
        entry = _entry(client, name)
        self.name = str(entry["id"])
        ours = entry.get("blockdiff")
        self.about: dict[str, Any] = ours if isinstance(ours, dict) else {}
        length = self.about.get("context_length")
        self.context: int | None = length if isinstance(length, int) else None
        self.drafts = drafts and bool(self.about)

    def check(self, settings: Settings) -> None:
        if not self.plain and self.about.get("chat") is False:
            raise ValueError(
                f"{self.client.base}: its model has no chat template, so it cannot chat: start the server with "
                "--chat-template FILE, or continue plain text with --plain"
            )

    def answer(self, conversation: Conversation, settings: Settings) -> Generator[Event]:
        """Where the context has less room than an answer may have tokens, it is asked for in what room there is."""
        refusal: TooLong | None = None
        for limit in self._limits(settings.max_new_tokens):
            try:
                yield from self._answer(self._body(conversation, settings, limit))
                return
            except TooLong as error:
                refusal = error
        raise ValueError(f"{full(None, self.context)}; {refusal}")

    def _limits(self, asked: int) -> list[int | None]:
        """Limits to try one after the other. In a chat, none at all is what the context holds; a completion without one
        would be 16 tokens."""
        most = self.about.get("max_tokens")
        limit = min(asked, most) if isinstance(most, int) and most > 0 else asked
        if not self.plain:
            return [None] if self.context is not None and limit >= self.context else [limit, None]
        return [limit >> halvings for halvings in range(limit.bit_length())]

    def _answer(self, body: dict[str, Any]) -> Generator[Event]:
        reading = _Reading(self)
        path = "/completions" if self.plain else "/chat/completions"
        with closing(self.client.stream(path, body)) as stream:
            for name, data in stream:
                if name == "" and data == "[DONE]":
                    break
                yield from reading.events(name, data)
        if not reading.reason:
            raise ConnectionError(f"{self.client.base}: the connection broke off before the end of the answer")
        yield reading.end()

    def _body(self, conversation: Conversation, settings: Settings, limit: int | None) -> dict[str, Any]:
        said = {"prompt": conversation.text} if self.plain else {"messages": conversation.messages}
        options = {
            "policy": settings.policy,
            "threshold": settings.threshold,
            "block_size": settings.block_size,
            "lossless": settings.lossless or None,
            "stream_drafts": self.drafts or None,
        }
        given = {key: value for key, value in options.items() if value is not None}
        return {
            "model": self.name,
            **said,
            **({} if limit is None else {"max_tokens": limit}),
            "temperature": settings.temperature,
            "seed": settings.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"diffusion": given} if given else {}),
        }


class _Reading:
    """What an answer's events have said so far."""

    def __init__(self, partner: RemotePartner) -> None:
        self.partner = partner
        self.reason = ""
        self.usage: dict[str, Any] = {}

    def events(self, name: str, data: str) -> Generator[Event]:
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                raise ConnectionError(f"{self.partner.client.base} broke the answer off: {message_of(data)}")
            if name == "draft":
                yield Draft(tuple(None if token is None else str(token) for token in chunk["tokens"]))
            elif not name:
                yield from self._chunk(chunk)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            base = self.partner.client.base
            raise ConnectionError(f"{base} sends what is no chunk of an answer: {one_line(data, 80)}") from None

    def _chunk(self, chunk: dict[str, Any]) -> Generator[Event]:
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            piece = choice.get("text") if self.partner.plain else (choice.get("delta") or {}).get("content")
            if piece:
                yield Text(str(piece))
            self.reason = choice.get("finish_reason") or self.reason

    def end(self) -> End:
        diffusion = self.usage.get("diffusion")
        about: dict[str, Any] = diffusion if isinstance(diffusion, dict) else {}
        tokens, total = self.usage.get("completion_tokens"), self.usage.get("total_tokens")
        context, cut = self.partner.context, self.reason == "length"
        spent = isinstance(total, int) and context is not None and total >= context
        notes = tuple(one_line(str(note)) for note in about.get("warnings") or ())
        return End(tokens, about.get("forwards"), cut=cut and not spent, full=cut and spent, notes=notes)


def _entry(client: Client, name: str | None) -> dict[str, Any]:
    """The server's own words about the model that is meant."""
    listed = client.get("/models")
    if listed is None and name is None:
        raise ValueError(f"{client.base} does not list its models; name one with --model, or is the address wrong?")
    try:
        models = {} if listed is None else {str(entry["id"]): dict(entry) for entry in listed["data"]}
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{client.base}/models: lists no models; is this an OpenAI-compatible server?") from None
    if name is None:
        if len(models) != 1:
            shown = one_line(", ".join(models))
            raise ValueError(f"{client.base} has {len(models)} models; choose one with --model: {shown}")
        return next(iter(models.values()))
    return models.get(name, {"id": name})  # not every server lists all that it has: it will say so itself

"""Whom one talks to: answers arrive as events, whether a model of this machine writes them or a server."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from blockdiff.chat.conversation import Conversation, Settings


@dataclass(frozen=True)
class Text:
    """Final text."""

    piece: str


@dataclass(frozen=True)
class Draft:
    """The open block: the text of each token, None where still masked. Provisional."""

    tokens: tuple[str | None, ...]


@dataclass(frozen=True)
class End:
    """The end of an answer. tokens and forwards: None where unknown; cut: ended by max_new_tokens; full: ended by the
    model's context."""

    tokens: int | None = None
    forwards: int | None = None
    cut: bool = False
    full: bool = False
    notes: tuple[str, ...] = ()


Event = Text | Draft | End


class Partner(Protocol):
    """name: shown to the user; context: tokens it can read and write in all, None where unknown."""

    name: str
    context: int | None

    def check(self, settings: Settings) -> None:
        """Raises ValueError for what it cannot do, as far as it knows before it is asked."""

    def answer(self, conversation: Conversation, settings: Settings) -> Generator[Event]:
        """The answer to the last turn: texts and drafts, and one End. Closing it gives the answer up.

        Raises ValueError for what cannot be asked, OSError where the way to the model fails.
        """
        ...


def full(tokens: int | None, context: int | None) -> str:
    """What to tell where a conversation does not fit."""
    has = "the conversation does not fit" if tokens is None else f"the conversation has {tokens} tokens and fills"
    holds = "the model's context" if context is None else f"the model's context of {context} tokens"
    return f"{has} {holds}: /clear begins anew (/save FILE keeps this conversation first)"

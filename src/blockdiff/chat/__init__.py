"""Conversations in the terminal, with a model of this machine or with an OpenAI-compatible server."""

from blockdiff.chat.conversation import Conversation, Settings
from blockdiff.chat.partner import Draft, End, Partner, Text
from blockdiff.chat.session import Session

__all__ = ["Conversation", "Draft", "End", "Partner", "Session", "Settings", "Text"]

"""Text of others, made safe for a terminal: it cannot move the cursor, change colours or turn the writing direction."""

from __future__ import annotations

import re

_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline; among them ESC and CSI
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # line separators, marks and overrides of the direction
    "\ud800-\udfff]"  # halves of characters: no terminal can be sent them
)


def printable(text: str) -> str:
    """The text with every such character as an escape (a carriage return as nothing)."""
    return _HARMFUL.sub(_escaped, text)


def one_line(text: str, longest: int = 300) -> str:
    """At most so many characters of it, in one line."""
    words = printable(" ".join(text.split()))
    return words if len(words) <= longest else words[: longest - 1] + "…"


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] == "\r":
        return ""
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

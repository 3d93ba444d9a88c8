"""What each token of a tokenizer adds to a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ANCHORS = ("a", "x", "0", ".")
_BROKEN = "\ufffd"  # how a decoder writes bytes that are not a whole character


def token_pieces(tokenizer: Any, vocabulary: int) -> tuple[str | None, ...]:
    """The text that each of `vocabulary` tokens adds; None for control tokens and for parts of a character.

    Read off behind another token: alone, a token of a sentencepiece tokenizer loses its leading space. Ids that the
    tokenizer does not know ([MASK], padding rows) are None. Needs `encode`, `decode` and `len` of the tokenizer only.
    Raises ValueError where no token can stand before the others.
    """
    anchor, lead = _anchor(tokenizer)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    pieces: list[str | None] = []
    for token in range(vocabulary):
        if token >= len(tokenizer) or token in special:
            pieces.append(None)
            continue
        text = _decoded(tokenizer, [anchor, token])
        piece = text[len(lead) :] if text.startswith(lead) else ""
        pieces.append(piece if piece and _BROKEN not in piece else None)
    return tuple(pieces)


def _anchor(tokenizer: Any) -> tuple[int, str]:
    """A token that is plain text, and that text."""
    for text in _ANCHORS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) and _decoded(tokenizer, [ids[-1]]) == text:
            return int(ids[-1]), text
    raise ValueError(f"the tokenizer has no token for any of {', '.join(_ANCHORS)}, so its pieces cannot be read off")


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def tokens_with(tokenizer: Any, strings: Sequence[str]) -> list[int]:
    """Tokens whose text holds one of the strings; [-1] where there is none."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if any(string in text for string in strings)] or [-1]

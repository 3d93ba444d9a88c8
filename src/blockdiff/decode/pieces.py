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
    reader = PieceReader(tokenizer)
    return tuple(reader.piece(token) for token in range(vocabulary))


class PieceReader:
    """Reads off what single tokens add to a text. Raises ValueError as `token_pieces` does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor, self._lead = _anchor(tokenizer)
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._texts: dict[int, str] = {}

    def piece(self, token: int) -> str | None:
        """The text that a token adds; None as in `token_pieces`."""
        if token >= len(self._tokenizer) or token in self._special:
            return None
        text = self._added(token)
        return text if text and _BROKEN not in text else None

    def text(self, token: int) -> str:
        """A token as a person may look at it: control tokens by their names, parts of a character as such."""
        if token not in self._texts:
            known = token < len(self._tokenizer)
            named = str(self._tokenizer.convert_ids_to_tokens(token)) if token in self._special else ""
            self._texts[token] = named or (self._added(token) if known else "")
        return self._texts[token]

    def _added(self, token: int) -> str:
        text = _decoded(self._tokenizer, [self._anchor, token])
        return text[len(self._lead) :] if text.startswith(self._lead) else ""


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

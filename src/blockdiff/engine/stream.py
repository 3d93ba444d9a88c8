"""Text from committed tokens: what may already be shown, and what each token adds."""

from __future__ import annotations

from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class TextStream:
    """Turns committed tokens into text that never changes once shown.

    Held back until certain: bytes of an unfinished character, and an end that could be the beginning of a stop string.
    Text that stood before the last call is not decoded again, so a block costs the same however long the text is.
    """

    LEAD, SETTLED = 16, 64  # tokens decoded before new ones for their sake; tokens after which text is settled

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._stop = stop
        self._shown = 0
        self._fed = 0
        self._settled = 0  # of the tokens, and their text
        self._settled_text = ""
        self.text = ""

    def feed(self, tokens: list[int]) -> bool:
        """Give all tokens so far; returns True when a stop string ends the text (which is then cut before it)."""
        if self._fed - self._settled >= self.SETTLED and len(tokens) > self._fed and not self.text.endswith("\ufffd"):
            self._settled, self._settled_text = self._fed, self.text
        self._fed = len(tokens)
        first = max(0, len(self._prompt) + self._settled - self.LEAD)
        known = (self._prompt[first:] + tokens[max(0, first - len(self._prompt)) : self._settled]) or []
        lead, whole = self._decode(known), self._decode(known + tokens[self._settled :])
        # the first token of a continuation may carry a space that decoding it alone would drop
        new = whole[len(lead) :] if whole.startswith(lead) else self._decode(tokens[self._settled :])
        self.text = self._settled_text + new
        searched = max(0, len(self._settled_text) - max(map(len, self._stop), default=0))
        found = [at for at in (self.text.find(text, searched) for text in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def new_text(self, *, final: bool) -> str:
        """Text that became certain since the last call."""
        ready = len(self.text)
        if not final:
            ready = len(self.text.rstrip("�"))
            ready -= max((_overlap(self.text, ready, text) for text in self._stop), default=0)
        piece = self.text[self._shown : ready]
        self._shown = max(self._shown, ready)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def pieces(tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], tokens: list[int]) -> list[str]:
    """The text that each token adds; joined, they are the text (a character of several tokens belongs to the last)."""
    stream = TextStream(tokenizer, prompt, ())
    out = []
    for count in range(1, len(tokens) + 1):
        stream.feed(tokens[:count])
        out.append(stream.new_text(final=count == len(tokens)))
    return out


def _overlap(text: str, end: int, stop: str) -> int:
    """Length of the longest end of text[:end] that begins `stop` without completing it."""
    return max((n for n in range(1, min(len(stop), end + 1)) if text.endswith(stop[:n], 0, end)), default=0)

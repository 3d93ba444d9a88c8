"""Text from committed tokens: what may already be shown, and what each token adds."""

from __future__ import annotations

from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class TextStream:
    """Turns committed tokens into text that never changes once shown.

    Held back until certain: bytes of an unfinished character, and an end that could be the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: tuple[int, ...], stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._prompt = list(prompt)
        self._lead = self._decode(self._prompt)
        self._stop = stop
        self._shown = 0
        self.text = ""

    def feed(self, tokens: list[int]) -> bool:
        """Give all tokens so far; returns True when a stop string ends the text (which is then cut before it)."""
        whole = self._decode(self._prompt + tokens)
        # the first token of a continuation may carry a space that decoding it alone would drop
        self.text = whole[len(self._lead) :] if whole.startswith(self._lead) else self._decode(tokens)
        found = [at for at in (self.text.find(text) for text in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)

    def new_text(self, *, final: bool) -> str:
        """Text that became certain since the last call."""
        ready = len(self.text)
        if not final:
            ready = len(self.text.rstrip("�"))
            ready -= max((_overlap(self.text[:ready], text) for text in self._stop), default=0)
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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    return max((n for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)

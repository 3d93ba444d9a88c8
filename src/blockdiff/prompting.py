"""Prompts as tokens: plain text and conversations, as a model's own tokenizer makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class Prompting:
    """What reads prompts: anything with a tokenizer."""

    tokenizer: PreTrainedTokenizerBase | None

    def encode(self, text: str) -> list[int]:
        """The prompt's tokens, as training made them: with the beginning token where the tokenizer adds one."""
        tokenizer = self._tokenizer
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not text: character {error.start} is no Unicode; give UTF-8") from error
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return ids

    def set_chat_template(self, file: Path) -> None:
        """Chat by the template (Jinja) in this file. Raises ValueError where it cannot be read or is none."""
        try:
            text = file.read_text(encoding="utf-8")
            Environment().parse(text)
        except (OSError, UnicodeDecodeError, TemplateError) as error:
            raise ValueError(f"--chat-template {file}: this is no chat template ({error})") from error
        self._tokenizer.chat_template = text

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation up to where the assistant answers, as training made them.

        messages: dicts of role and content. Raises ValueError where the tokenizer has no chat template, or its template
        refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(
                "the model's tokenizer has no chat template, so it cannot chat: continue plain text instead, or give "
                "it the template that it was trained with (--chat-template FILE)"
            )
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            str(text).encode()
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation ({error})") from error
        except UnicodeEncodeError as error:
            raise ValueError("a message is not text: it holds characters that are no Unicode; give UTF-8") from error
        ids: list[int] = self._tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: load it from a directory that holds one")
        return self.tokenizer

"""A model of this machine as partner."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import replace
from itertools import groupby

from blockdiff.api import Model
from blockdiff.chat.conversation import Conversation, Settings
from blockdiff.chat.interrupts import undisturbed
from blockdiff.chat.partner import Draft, End, Event, Text, full
from blockdiff.decode import Policy, Sampling, changed, named
from blockdiff.engine.checks import check
from blockdiff.engine.engine import Engine
from blockdiff.engine.limits import Limits, slots_of
from blockdiff.engine.network import prepared
from blockdiff.engine.request import Request, Step
from blockdiff.engine.stream import pieces


class LocalPartner:
    """drafts: whether the open block is told too."""

    def __init__(self, model: Model, name: str, *, plain: bool, drafts: bool) -> None:
        self.model, self.name, self.plain, self.drafts = model, name, plain, drafts
        self.engine: Engine | None = None
        self.context: int | None = model.context_length if model.context_length < 1 << 30 else None

    def check(self, settings: Settings) -> None:
        probe = Conversation(turns=("a",), plain=self.plain)
        check(self.model, self._request(self._prompt(probe), settings))

    def answer(self, conversation: Conversation, settings: Settings) -> Generator[Event]:
        prompt = self._prompt(conversation)
        if self.context is not None and len(prompt) >= self.context:
            raise ValueError(full(len(prompt), self.context))
        request = self._request(prompt, settings)
        engine = self._engine_for(request)
        told: deque[Event] = deque()

        def on_step(step: Step) -> None:
            told.append(Draft(self._draft(prompt, step.tokens)))

        with prepared(self.model):
            job = engine.add(request, lambda piece: told.append(Text(piece)), on_step if self.drafts else None)
            try:
                while engine.busy:
                    with undisturbed():  # torch would make a RuntimeError of Ctrl-C, or leave the pass half done
                        engine.step()
                    while told:
                        yield told.popleft()
            finally:
                if job.output is None:
                    engine.cancel(job)
        output = job.output
        assert output is not None
        cut = output.finish_reason == "length"
        problem = self.model.uncovered(request)
        spent = self.context is not None and len(prompt) + len(output.tokens) >= self.context
        notes = (problem,) if problem else ()
        yield End(len(output.tokens), output.forwards, cut=cut and not spent, full=cut and spent, notes=notes)

    def _engine_for(self, request: Request) -> Engine:
        """The engine of the answers before, which still holds what was said, while it has room for this one too."""
        limits = Limits()
        pages = -(-slots_of(self.model, request, limits) // limits.page_size)
        if self.engine is None or self.engine.limits.pages < pages:
            self.engine = Engine(self.model, replace(limits, pages=2 * pages))
        return self.engine

    def _prompt(self, conversation: Conversation) -> tuple[int, ...]:
        if self.plain:
            return tuple(self.model.encode(conversation.text))
        return tuple(self.model.encode_chat(conversation.messages))

    def _request(self, prompt: tuple[int, ...], settings: Settings) -> Request:
        chosen = settings.policy is not None or settings.threshold is not None
        return self.model.request(
            prompt,
            block_size=settings.block_size,
            policy=_policy(settings) if chosen else None,
            lossless=settings.lossless,
            max_new_tokens=settings.max_new_tokens,
            sampling=Sampling(settings.temperature),
            seed=settings.seed,
        )

    def _draft(self, prompt: tuple[int, ...], tokens: tuple[int | None, ...]) -> tuple[str | None, ...]:
        """Each token's text, decoded with its neighbours: a character may need several, a space one before it."""
        tokenizer = self.model.tokenizer
        assert tokenizer is not None
        shown: list[str | None] = []
        for masked, run in groupby(tokens, lambda token: token is None):
            same = list(run)
            known = [token for token in same if token is not None]
            shown.extend([None] * len(same) if masked else pieces(tokenizer, prompt[-1:], known))
        return tuple(shown)


def _policy(settings: Settings) -> Policy:
    return changed(named(settings.policy or "threshold"), settings.threshold, None)

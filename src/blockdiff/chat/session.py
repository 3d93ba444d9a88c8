"""The conversation loop: lines in, answers out, and the commands."""

from __future__ import annotations

import math
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

from blockdiff.chat.conversation import Conversation, Settings
from blockdiff.chat.partner import End, Partner, Text, full
from blockdiff.chat.screen import Screen
from blockdiff.files import write_json
from blockdiff.runtime import record

with suppress(ImportError):  # input() edits lines and remembers them where the system has it
    import readline  # noqa: F401

HELP = """\
/help              this list
/clear             begin anew; the system text stays
/set KEY=VALUE     change how answers are decoded; without one: show the settings
/system TEXT       set the system text; without one: remove it
/save FILE         write the conversation as JSON
/exit              end (so do Ctrl-D, and Ctrl-C at the prompt)
Ctrl-C             stops an answer; what is there stays
//...              sends a line that begins with /"""

_LATE = 1.0  # seconds after an answer in which Ctrl-C is still meant for it, and does not end the session
_NO_TEXT = "the input is not text: it holds bytes that are no Unicode; give UTF-8"


class Session:
    """interactive: somebody types, so that errors are said and the conversation goes on; else they end it."""

    def __init__(
        self, partner: Partner, conversation: Conversation, settings: Settings, screen: Screen, *, interactive: bool
    ) -> None:
        self.partner, self.screen, self.interactive = partner, screen, interactive
        self.conversation, self.settings = conversation, settings
        self._warned = False  # of these settings
        self._answered = -math.inf

    def run(self) -> None:
        """Until /exit or the end of the input. Where nobody types: raises ValueError and OSError as they come."""
        if self.interactive:
            context = "" if self.partner.context is None else f", context of {self.partner.context} tokens"
            self.screen.say(f"{self.partner.name}{context}. /help lists the commands, Ctrl-D ends.")
        while (line := self._read()) is not None:
            try:
                if not self._take(line):
                    return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.screen.say("stopped")
            except (ValueError, OSError) as error:
                if not self.interactive:
                    raise
                self.screen.say(str(error), "red")

    def _read(self) -> str | None:
        """The next line; None at the end."""
        try:
            if self.interactive:
                return self._typed()
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise ValueError(_NO_TEXT) from None
        return line.rstrip("\r\n") if line else None

    def _typed(self) -> str | None:
        while True:
            try:
                return input("> ")
            except EOFError:
                break
            except KeyboardInterrupt:
                if time.perf_counter() - self._answered > _LATE:
                    break
                self.screen.err.print()
        self.screen.err.print()
        return None

    def _take(self, line: str) -> bool:
        """Obey or answer a line; False where it ends the session."""
        if any("\ud800" <= character <= "\udfff" for character in line):  # what bytes are read as that are no UTF-8
            raise ValueError(_NO_TEXT)
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.strip().partition(" ")
            if name == "/exit":
                return False
            self._command(name, rest.strip())
        elif self.conversation.plain or line.strip():
            self._answer(line[1:] if line.startswith("//") else line)
        return True

    # ---- answers

    def _answer(self, line: str) -> None:
        """One turn. Whatever ends it early, text that is there stays in the conversation."""
        asked = self.conversation.with_turn(line)
        written: list[str] = []
        end, began = None, time.perf_counter()
        try:
            with self.screen.answer() as drawing, closing(self.partner.answer(asked, self.settings)) as events:
                for event in events:
                    if isinstance(event, End):
                        end = event
                    elif isinstance(event, Text):
                        written.append(event.piece)
                        drawing.text(event.piece)
                    else:
                        drawing.draft(event.tokens)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.screen.say("stopped" if written else "stopped before any text: the message is taken back")
        finally:
            self._answered = time.perf_counter()
            if written or end is not None:
                self.conversation = asked.with_turn("".join(written))
        if end is not None:
            self._summarize(end, time.perf_counter() - began)

    def _summarize(self, end: End, seconds: float) -> None:
        parts = []
        if end.tokens is not None:
            parts.append(f"{end.tokens} tokens")
            if end.forwards is not None:
                per_forward = end.tokens / max(end.forwards, 1)
                parts += [f"{end.forwards} forwards", f"{per_forward:.2f} tokens per forward with commits"]
            parts.append(f"{end.tokens / max(seconds, 1e-9):.1f} tokens/s")
        self.screen.say(", ".join([*parts, f"{seconds:.2f} s"]))
        for note in end.notes if not self._warned else ():
            self.screen.say(f"warning: {note}", "yellow")
        self._warned = self._warned or bool(end.notes)
        if end.full:
            self.screen.say(full(self.partner.context, self.partner.context), "yellow")
        elif end.cut:
            self.screen.say("cut at the limit of tokens: /set max_new_tokens=... changes it")

    # ---- commands

    def _command(self, name: str, rest: str) -> None:
        """Obey one command. Raises ValueError for one that is not understood."""
        if name in ("/help", "/clear") and rest:
            raise ValueError(f"{name} takes nothing behind it")
        if name == "/help":
            self.screen.say(HELP)
        elif name == "/clear":
            self.conversation = Conversation(self.conversation.system, plain=self.conversation.plain)
            self.screen.say("a new conversation")
        elif name == "/set":
            self._set(rest)
        elif name == "/system":
            self.conversation = Conversation(rest, self.conversation.turns, self.conversation.plain)
            self.screen.say("system text set" if rest else "no system text")
        elif name == "/save":
            self._save(rest)
        else:
            raise ValueError(f"{name} is no command; /help lists them (//... sends a line that begins with /)")

    def _set(self, change: str) -> None:
        if change:
            settings = self.settings.changed(change)
            self.partner.check(settings)
            self.settings, self._warned = settings, False
        self.screen.say(self.settings.described)

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save: give the name of a file")
        path = Path(name).expanduser()
        if path.exists() or path.is_symlink():
            raise ValueError(f"/save {name}: exists already, and nothing is overwritten; give another name")
        saved = record(
            "chat",
            self.settings.seed,
            model=self.partner.name,
            settings=vars(self.settings),
            plain=self.conversation.plain,
            messages=self.conversation.messages,
        )
        del saved["invocation"]  # it may hold an API key
        write_json(path, saved)
        self.screen.say(f"saved to {path}")

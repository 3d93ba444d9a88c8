"""A command on a pseudo-terminal, as somebody at a keyboard meets it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time

import psutil


class Terminal:
    """`blockdiff` with these arguments; `expect` what it shows, `send` keys."""

    def __init__(self, *arguments: object, width: int = 80) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        command = [sys.executable, "-c", _OWN_TERMINAL, *map(str, arguments)]
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "", "NO_COLOR": ""}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
        )
        os.close(slave)
        self._unread = ""

    def expect(self, text: str, seconds: float = 60.0) -> str:
        """What is shown up to this text, with it."""
        end = time.monotonic() + seconds
        while text not in self._unread:
            assert time.monotonic() < end, f"{text!r} did not come; there was {self._unread!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self._unread += os.read(self._master, 1 << 16).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"it ended before {text!r}; there was {self._unread!r}") from None
        end_of_text = self._unread.index(text) + len(text)
        shown, self._unread = self._unread[:end_of_text], self._unread[end_of_text:]
        return shown

    def interrupt(self) -> None:
        """Ctrl-C, when it waits for keys: between the prompt and that, CPython's readline loses it."""
        end = time.monotonic() + 60
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < end, "it does not wait for keys"
            time.sleep(0.01)
        self.send("\x03")

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self, seconds: float = 20.0) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


_OWN_TERMINAL = """
import fcntl, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches who has the terminal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
from blockdiff.cli import main
sys.argv[0] = "blockdiff"
main()
"""

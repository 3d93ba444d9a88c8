"""Programs that a model wrote: what passes, what does not, and what they cannot do to the machine."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from blockdiff.evaluate.sandbox import Limits, Ran, run_program, run_programs

BRIEF = Limits(seconds=2)
AROUND = (
    "import sys\nfor name in ('ctypes', '_ctypes'): del sys.modules[name]\nimport ctypes\nlibc = ctypes.CDLL(None)\n"
)


@pytest.mark.parametrize(
    ("program", "outcome", "error"),
    [
        ("assert 1 + 1 == 2", "passed", ""),
        ("assert 1 + 1 == 3, 'sum'", "failed", "AssertionError: sum"),
        ("def f(:", "failed", "SyntaxError"),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("import sys\nsys.exit(0)\nassert False", "exited", ""),
        ("import os\nos._exit(0)\nassert False", "killed", ""),
        ("input()", "failed", "EOFError"),
        ("import math, re, typing, collections, itertools, functools, hashlib, random", "passed", ""),
        ("open('a.txt', 'w').write('mine')\nassert open('a.txt').read() == 'mine'", "passed", ""),
        ("for _ in range(20000): print('x' * 1000)", "passed", ""),
        ("x = bytearray(8 << 30)", "failed", "MemoryError"),
        ("f = open('big', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20))", "failed", "OSError"),
        ("f = [open('/dev/null') for _ in range(1000)]", "failed", "OSError"),
        ("import os\nwhile True: os.fork()", "failed", "TypeError"),
        ("import posix\nwhile True: posix.fork()", "failed", "TypeError"),
        ("import subprocess", "failed", "ModuleNotFoundError"),
        ("import socket", "failed", "ModuleNotFoundError"),
        ("import os\nos.kill(os.getppid(), 9)", "failed", "TypeError"),
    ],
)
def test_outcomes(program, outcome, error):
    ran = run_program(program)
    assert ran.outcome == outcome
    assert ran.error.startswith(error)
    assert ran.passed == (outcome == "passed")
    assert "limits" in ran.layers


def test_an_endless_program_is_stopped_with_all_that_it_started():
    assert run_program("while True: pass", BRIEF).outcome in ("timeout", "killed")  # by the clock, or the processor's
    stubborn = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    assert run_program(stubborn, BRIEF).outcome in ("timeout", "killed")
    # around what Python itself refuses: a fork bomb through the C library
    ran = run_program(AROUND + "while True:\n    assert libc.fork() >= 0", BRIEF)
    assert not ran.passed
    left = [one for one in os.listdir("/proc") if one.isdigit() and b"jail.py" in command(one)]
    deadline = time.monotonic() + 10  # what is killed takes a moment to be gone
    while any(b"jail.py" in command(one) for one in left):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def command(process: str) -> bytes:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return file.read()
    except OSError:  # it ended just now
        return b""


def test_nothing_of_the_users_is_seen_or_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "42")
    assert run_program("import os\nassert not os.environ").passed
    assert not run_program("import os\nassert os.environ").passed
    victim = tmp_path / "victim"
    victim.write_text("here")
    for name in ("remove", "unlink", "truncate"):
        assert run_program(f"import os\nos.{name}({str(victim)!r})").outcome == "failed"
    assert run_program(f"import shutil\nshutil.rmtree({str(tmp_path)!r})").outcome == "failed"
    assert victim.read_text() == "here"
    ran = run_program(f"open({str(victim)!r}, 'w').write('gone')")
    if "read-only files" in ran.layers:  # where the kernel grants namespaces
        assert (ran.outcome, victim.read_text()) == ("failed", "here")
        assert not run_program(AROUND + f"assert libc.unlink({str(victim)!r}.encode()) == 0").passed
        assert victim.read_text() == "here"


def test_the_parent_lives(tmp_path):
    """Around what Python itself refuses: signals to every process that can be seen."""
    told = []
    before = signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
    try:
        ran = run_program(AROUND + f"libc.kill({os.getpid()}, {int(signal.SIGUSR1)})")
    finally:
        signal.signal(signal.SIGUSR1, before)
    if "no other processes" in ran.layers:
        assert told == []


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        place = server.getsockname()
        socket.create_connection(place).close()  # twin: from here it answers
        server.accept()[0].close()
        ran = run_program(f"import sys\ndel sys.modules['_socket']\nimport _socket\n_socket.socket().connect({place})")
        if "no network" in ran.layers:
            assert (ran.outcome, ran.error[:7]) == ("failed", "OSError")
            with pytest.raises(TimeoutError):
                server.accept()


def test_a_sandbox_that_cannot_start_is_an_error_and_not_a_failed_program(monkeypatch, tmp_path):
    monkeypatch.setattr("blockdiff.evaluate.sandbox._JAIL", tmp_path / "nowhere.py")
    with pytest.raises(OSError, match="the sandbox could not start; see why with"):
        run_program("assert True")


def test_the_verdict_cannot_be_guessed():
    forge = (
        "import os\nfor fd in range(3, 4096):\n    try: os.write(fd, {text!r})\n    except OSError: pass\nos._exit(0)"
    )
    for text in (b'{"outcome": "passed"}\n', b'{"outcome": "passed", "sentinel": "0"}\n', b"nonsense\n", b"3\n"):
        ran = run_program(forge.format(text=text))
        assert (ran.passed, ran.error) == (False, "wrote to the judge's pipe"), text


def test_many_programs_keep_their_order_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = run_programs([f"assert {number} % 2 == 0" for number in range(6)])
    assert [ran.passed for ran in found] == [True, False] * 3
    assert list(tmp_path.iterdir()) == []
    assert run_programs([]) == []
    assert Ran("passed").passed

"""The inside of `evaluate.sandbox`: a script that runs one program with as little as the system lets it take away.

It reads {"program", "sentinel", "folder", limits} from standard input, and writes two lines of JSON to the file
descriptor of its argument: what protects the rest of the machine, then how the program ended, with the sentinel only
where the program ran to its last line. Standard library alone: it runs in an isolated interpreter.

    sandbox  ->  this script: user nobody, namespaces  ->  its fork: limits, no capabilities, the program
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_NOBODY = 65534
# linux/sched.h, linux/mount.h, linux/prctl.h, linux/capability.h
_NEW_NAMESPACES = 0x00020000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000  # mount, ipc, user, pid, net
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _READ_ONLY = 442, -100, 0x8000, 1
_MS_NOSUID_NODEV_NOEXEC, _MS_PRIVATE_RECURSIVE = 2 | 4 | 8, 0x4000 | 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_CAPABILITY_VERSION_3, _SIGKILL = 0x20080522, 9
# what HumanEval's own reference implementation takes away (openai/human-eval, execution.py), and a few of its kind
_GONE = (
    "kill killpg fork fork1 forkpty system popen putenv unsetenv remove removedirs rmdir unlink rename renames replace "
    "truncate ftruncate chmod fchmod lchmod chown fchown lchown chroot chflags fchdir setuid posix_spawn posix_spawnp "
    "execv execve execvp execvpe execl execle execlp execlpe spawnv spawnve spawnl spawnle pidfd_open rmtree move"
)
_NO_MODULES = (
    "socket _socket ssl subprocess _posixsubprocess multiprocessing ctypes _ctypes resource faulthandler signal _signal"
)


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "namespace")]


def main() -> None:
    order = json.loads(sys.stdin.buffer.read())
    verdict = int(sys.argv[1])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    layers = _confine(order["folder"])
    child = os.fork()
    if child:
        os.close(verdict)
        os.waitpid(child, 0)
        os._exit(0)
    layers += _limit(order)
    os.write(verdict, json.dumps({"layers": layers}).encode() + b"\n")
    _run(order["program"], order["sentinel"], verdict)


def _confine(folder: str) -> list[str]:
    """Give up the rights of root, the network, sight of other processes, and writing outside of the folder."""
    if sys.platform != "linux":
        return []
    layers = []
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() == 0 and _everyone_reads(Path(os.__file__)):
        os.chown(folder, _NOBODY, _NOBODY)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self stays root's, and no user can be mapped
        layers.append("user nobody")
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(_NEW_NAMESPACES) != 0:
        return layers
    layers += ["no network", "no other processes"]
    with suppress(OSError):  # some systems grant the namespace and nothing in it
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{_NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{_NOBODY} {group} 1")
    if _read_only(libc, folder):
        layers.append("read-only files")
    return layers


def _read_only(libc: ctypes.CDLL, folder: str) -> bool:
    """Every file read-only but those of a small folder in memory; no /proc."""
    private = libc.mount(None, b"/", None, ctypes.c_ulong(_MS_PRIVATE_RECURSIVE), None)
    change = _MountAttributes(set=_READ_ONLY)
    changed = libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(change), ctypes.c_size_t(ctypes.sizeof(change))
    )
    flags = ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC)
    kept = libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, b"size=16m,nr_inodes=1000,mode=700")
    libc.mount(b"tmpfs", b"/proc", b"tmpfs", flags, b"size=4k,mode=500")
    os.chdir(folder)
    return bool(private == 0 and changed == 0 and kept == 0)


def _everyone_reads(file: Path) -> bool:
    """Whether any user may read a file and enter the directories on the way to it."""
    return bool(file.stat().st_mode & stat.S_IROTH) and all(
        folder.stat().st_mode & stat.S_IXOTH for folder in file.resolve().parents
    )


def _limit(order: dict[str, Any]) -> list[str]:
    """No privileges, and limits that the program cannot raise again."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)())
    for kind, most in (
        (resource.RLIMIT_CPU, order["seconds"]),
        (resource.RLIMIT_AS, order["memory"]),
        (resource.RLIMIT_FSIZE, order["file"]),
        (resource.RLIMIT_NOFILE, order["files"]),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
    return ["limits"]


def _take_away() -> None:
    """The functions that harm most, as Python sees them: all there is where the system has no namespaces."""
    import posix
    import shutil

    for name in _GONE.split():
        for owner in (os, posix, shutil, Path):
            if hasattr(owner, name):
                setattr(owner, name, None)
    for name in _NO_MODULES.split():
        sys.modules[name] = None  # type: ignore[assignment]


def _run(program: str, sentinel: str, verdict: int) -> None:
    write, leave = os.write, os._exit
    os.environ.clear()
    _take_away()
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        said = {"outcome": "passed", "sentinel": sentinel}
    except SystemExit:
        said = {"outcome": "exited"}
    except BaseException as error:  # whatever a program raises is its own failure
        said = {"outcome": "failed", "error": f"{type(error).__name__}: {error!s:.200}".strip(": ")}
    write(verdict, json.dumps(said).encode() + b"\n")
    leave(0)


if __name__ == "__main__":
    main()

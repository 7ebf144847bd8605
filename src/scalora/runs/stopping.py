"""A run that is stopped before its end says so in its folder: at which step, in which process and by what.

A process that is asked to end (SIGTERM: by a launcher whose other process has died, by a scheduler, by `scalora
compare`) may be waiting for a process that is gone, and then never gets to an exception handler. So the note is written
by a thread, which the signal wakes whatever else the process does, and which ends the process if nothing else does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

from scalora.parallel.job import is_loss_of_another
from scalora.parallel.processes import process_count, process_rank
from scalora.runs.errors import DivergedError
from scalora.runs.run_folder import STOPPED_FILE, write_json

# Between being asked to end and ending all the same. Launchers and schedulers kill after 30 seconds.
_GRACE_SECONDS = 10.0

_ASKED = "it was asked to end (SIGTERM)"

_SHOWN = 300  # characters of an error that the note quotes


class TerminatedError(BaseException):
    """The process has been asked to end. No `Exception`, because nothing shall go on after it."""


@contextmanager
def stops_noted(folder: Path, step: Callable[[], int]) -> Iterator[None]:
    """Context manager for the training of a run: writes ``stopped.json`` if it does not come to its end.

    In a job of several processes, the first of those that notice writes it. A run that has diverged or has taken no
    step has none.

    Args:
        folder: the run folder.
        step: returns the number of the last step that this process has taken; 0 before the first.

    Raises:
        TerminatedError: the process got SIGTERM.
    """
    one_at_a_time = threading.Lock()  # neither thread ends the process while the other writes

    def note(reason: str) -> None:
        with one_at_a_time:
            if not step() or (folder / STOPPED_FILE).exists():
                return
            content = {
                "step": step(),
                "reason": reason,
                "process": process_rank(),
                "processes": process_count(),
                "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            write_json(folder / STOPPED_FILE, content)

    with _woken_by_sigterm(lambda: note(_ASKED)):
        try:
            yield
        except DivergedError:
            raise
        except BaseException as error:
            note(_reason(error))
            raise


def _reason(error: BaseException) -> str:
    if isinstance(error, TerminatedError):
        return _ASKED
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted (SIGINT)"
    words = " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]
    if is_loss_of_another(error):
        return f"another process of the job has ended, which the launcher names ({words})"
    return words


@contextmanager
def _woken_by_sigterm(act: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may set signal handlers
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    asked, acted, left = threading.Event(), threading.Event(), threading.Event()

    def watch() -> None:
        while received := receiver.recv(1):
            if received[0] == signal.SIGTERM:
                with suppress(OSError):  # a full disk must not keep the process
                    act()
                acted.set()
                if not left.wait(_GRACE_SECONDS):
                    os._exit(128 + signal.SIGTERM)
                return

    def raise_error(number: int, frame: FrameType | None) -> None:
        if not asked.is_set():  # once, so that what it leads to is not cut off
            asked.set()
            raise TerminatedError("training was asked to end (SIGTERM)")

    earlier = signal.signal(signal.SIGTERM, raise_error)
    earlier_socket = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    _not_in_forks.add(sender.fileno())
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        if asked.is_set():
            acted.wait(_GRACE_SECONDS)
        left.set()
        _not_in_forks.discard(sender.fileno())
        signal.set_wakeup_fd(earlier_socket)
        signal.signal(signal.SIGTERM, earlier)
        sender.close()


# Sockets of this process. A worker that is forked from it, and ended by its signal, is not to wake it.
_not_in_forks: set[int] = set()


def _forget_in_fork() -> None:
    if _not_in_forks:
        _not_in_forks.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_fork)

"""How a run stops before its end: by a signal, by a second Ctrl-C, or because its launcher is gone.

SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 all ask for the same: save what is trained and stop. While nothing is to
be saved (images are read, the model is exported), they end the run at once. Under `nohup` SIGHUP stays ignored.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil

from cm_diffusers.parent import parent


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
LOOK = 1.0  # seconds between two looks at the parent
ECHO = 3.0  # seconds within which a launcher hands on a signal that its processes had already
LONGEST_SAVE = 300  # seconds
PATIENCE = 5.0  # seconds that a process has to end where nothing is to be saved; it may wait for another one


def _keep_signals_apart() -> None:
    """In a forked process: what it hears is not for the run that started it."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_signals_apart)


class Stopped(SystemExit):
    """The run was asked to stop, and did; `message` says where it is and how it goes on."""

    def __init__(self, number: int, message: str):
        super().__init__(128 + number)
        self.message = message

    def end(self) -> NoReturn:
        """End the program; one of several processes without the orderly end, which waits for the others."""
        if _is_one_of_several():
            end_children()
            sys.stdout.flush()
            os._exit(self.code)
        raise self


class Stopping:
    """A context in which a run can be asked to stop.

    Outside of `held` a request raises `Stopped` where the program is, or ends a process that does not react. In it the
    training loop looks at `requested` after each step. A second Ctrl-C ends the program at once. Threads other than
    the main one can't have signals: in these, nothing is caught.

    Attributes:
        requested: the number of the first signal, 0 while there is none.
        remark: the end of the sentence "Stopped by SIGTERM ...", as long as nothing is to be saved.
    """

    def __init__(self) -> None:
        self.requested, self.remark = 0, "before training began; nothing is lost: the same command begins again."
        self._held, self._cause = False, ""
        self._first = self._answered = float("inf")  # when the first signal came, and when the main thread saw to it
        self._process, self._parent = os.getpid(), parent()
        self._has_others = _is_one_of_several()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._is_launched = _is_launched(self._parent)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if _is_under_nohup():
            del before[signal.SIGHUP]
        self._before = before
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, self._on_signal)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        self._mouth.send(bytes(1))  # forked processes may keep it open
        self._thread.join()
        self._mouth.close()
        self._ear.close()
        self._before = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Requests wait for the training loop; one that it does not see any more stops the run after the block."""
        self.check()
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    def check(self) -> None:
        """Raise Stopped if that was asked for."""
        if self.requested:
            raise self.stopped(self.remark)

    def stopped(self, remark: str) -> Stopped:
        """What to raise: "Stopped by SIGTERM <remark>"."""
        self._answered = time.monotonic()
        number = self.requested or signal.SIGTERM  # by the signal of another process
        return Stopped(number, f"Stopped by {self._cause or signal.Signals(number).name} {remark}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self.requested:
            return  # not the run's own, or an echo
        self.requested = number
        if not self._held:
            raise self.stopped(self.remark)

    # --- a thread hears of signals even while the main thread is in a call that does not return ---------------------

    def _listen(self) -> None:
        while True:
            if select.select([self._ear], [], [], LOOK)[0]:
                numbers = self._ear.recv(64)
                if 0 in numbers:
                    return
                for number in numbers:
                    self._hear(number)
            if self._first == float("inf") and self._is_launched and os.getppid() != self._parent:
                self._cause = f"the end of the program that started it (process {self._parent})"
                os.kill(self._process, signal.SIGTERM)
            if self._is_stuck():
                self._leave(self.requested or signal.SIGTERM, "as another process does not answer.")

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if number not in self._before:
            return
        if self._first == float("inf"):
            self._first = now
        elif number == signal.SIGINT and not (self._has_others and now - self._first < ECHO):
            self._leave(number, "as a second Ctrl-C asks; the same command goes on from the newest checkpoint.")

    def _is_stuck(self) -> bool:
        """Whether the main thread has had time enough to end, where there is nothing to save; of several processes one
        may wait for another that has ended."""
        now = time.monotonic()
        if self._answered < float("inf"):
            return self._has_others and now > self._answered + 3 * PATIENCE
        return not self._held and now > self._first + PATIENCE

    def _leave(self, number: int, why: str) -> None:
        """End this process and those that it started, whatever the main thread does."""
        os.write(2, f"\nLeft at once, {why}\n".encode())
        end_children()
        os._exit(128 + number)


def leave_signals_to_the_run(worker: int) -> None:
    """For a process that loads images: a signal to all processes must not end it before the run has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # else the run, which ends it, would wait for it if it can't
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LONGEST_SAVE))


def end_children() -> None:
    """End the processes that this one has started, and theirs."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def _is_under_nohup() -> bool:
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def _is_one_of_several() -> bool:
    return "WORLD_SIZE" in os.environ


def _is_launched(parent: int) -> bool:
    """Whether the run is to end with the process that started it: a Python program, as accelerate and torchrun are.

    Shells and terminals may be closed behind a run; so may all that started it in a session of its own, or with nohup.
    """
    if parent <= 1 or sys.platform == "win32":
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun gives each process a session of its own
        return True
    if os.getsid(0) == os.getpid() or _is_under_nohup():
        return False
    try:
        return Path(psutil.Process(parent).exe()).name.lower().startswith("python")
    except psutil.NoSuchProcess:  # it is gone already; these leave a trace
        return any(key.startswith("ACCELERATE_") for key in os.environ)
    except psutil.Error:
        return False


class _Unbroken:
    """A stream whose reader may go away: what is written then is lost, and nothing else."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbroken_output() -> Iterator[None]:
    """A terminal that is closed, or a pipe that nobody reads any more, does not keep the run from saving."""
    with contextlib.redirect_stdout(_Unbroken(sys.stdout)), contextlib.redirect_stderr(_Unbroken(sys.stderr)):
        yield

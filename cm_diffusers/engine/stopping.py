"""Stop a run before its end: by a signal, by a second Ctrl-C, or because its launcher is gone.

SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 all ask the run to save a checkpoint and stop. While there is nothing to
save (when images are read or the model is exported), they end the run at once. Under `nohup` SIGHUP stays ignored.
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
LOOK = 1.0  # seconds between two checks of the parent process
ECHO = 3.0  # seconds in which a launcher forwards a signal that its processes have already received
LONGEST_SAVE = 300  # seconds for the last checkpoint, at most
PATIENCE = 5.0  # seconds for the end of a process with nothing to save; it can be waiting for another one


def _keep_signals_apart() -> None:
    """In a forked process: keep its signals from the run that started it."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_signals_apart)


class Stopped(SystemExit):
    """The run was asked to stop, and has stopped.

    Args:
        number: the number of the signal; the exit code is 128 + `number`.
        message: a sentence about the state of the run and how to continue it.
    """

    def __init__(self, number: int, message: str):
        super().__init__(128 + number)
        self.message = message

    def end(self) -> NoReturn:
        """End the program. One of several processes exits directly, because an orderly exit waits for the others."""
        if _is_one_of_several():
            end_children()
            sys.stdout.flush()
            os._exit(self.code)
        raise self


class Stopping:
    """A context manager that catches requests to stop a run.

    - Outside of `held`, a request raises `Stopped` in the main thread, or ends a process that does not react.
    - Inside of `held`, the training loop checks `requested` after each step.
    - A second Ctrl-C ends the program at once.

    Python handles signals in the main thread only, so in other threads this context does nothing.

    Attributes:
        requested: the number of the first signal; 0 before any signal.
        remark: the end of the sentence "Stopped by SIGTERM ..." outside of `held`.
    """

    def __init__(self) -> None:
        self.requested, self.remark = 0, "before training began. Nothing is lost; the same command starts again."
        self._held, self._cause = False, ""
        self._first = self._answered = float("inf")  # times of the first signal, and of the main thread's reaction
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
        self._mouth.send(bytes(1))  # end the thread; forked processes can keep the socket open
        self._thread.join()
        self._mouth.close()
        self._ear.close()
        self._before = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A context in which requests wait for the training loop.

        Raises:
            Stopped: a request came before the context, or came too late in it for the training loop.
        """
        self.check()
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    def check(self) -> None:
        """Stop the run if that was requested.

        Raises:
            Stopped: a signal has asked the run to stop.
        """
        if self.requested:
            raise self.stopped(self.remark)

    def stopped(self, remark: str) -> Stopped:
        """The exception to raise, with the message "Stopped by SIGTERM `remark`"."""
        self._answered = time.monotonic()
        number = self.requested or signal.SIGTERM  # another process received the signal
        return Stopped(number, f"Stopped by {self._cause or signal.Signals(number).name} {remark}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self.requested:
            return  # a forked process, or a repeated signal
        self.requested = number
        if not self._held:
            raise self.stopped(self.remark)

    # --- a thread receives signals even while the main thread is in a call that does not return ---------------------

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
                self._leave(self.requested or signal.SIGTERM, "because another process does not respond.")

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if number not in self._before:
            return
        if self._first == float("inf"):
            self._first = now
        elif number == signal.SIGINT and not (self._has_others and now - self._first < ECHO):
            self._leave(number, "because of a second Ctrl-C. The same command resumes at the newest checkpoint.")

    def _is_stuck(self) -> bool:
        """Whether the main thread has had enough time to end, with nothing to save.

        One of several processes can be waiting for another one that has ended.
        """
        now = time.monotonic()
        if self._answered < float("inf"):
            return self._has_others and now > self._answered + 3 * PATIENCE
        return not self._held and now > self._first + PATIENCE

    def _leave(self, number: int, why: str) -> None:
        """End this process and all that it started, regardless of the main thread."""
        os.write(2, f"\nThe program ended at once, {why}\n".encode())
        end_children()
        os._exit(128 + number)


def leave_signals_to_the_run(worker: int) -> None:
    """Ignore signals in a process that loads images, so that it lives until the run has saved its checkpoint.

    SIGTERM ends it after `LONGEST_SAVE` seconds.

    Args:
        worker: the number of the process, which is not used.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # else the run, which ends this process by SIGTERM, could wait for it for ever
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LONGEST_SAVE))


def end_children() -> None:
    """End all processes that this one has started, and their children."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def _is_under_nohup() -> bool:
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def _is_one_of_several() -> bool:
    return "WORLD_SIZE" in os.environ


def _is_launched(parent: int) -> bool:
    """Whether the run must end with its parent process: a Python program, as accelerate and torchrun are.

    A run continues without its shell or terminal, and without a parent that started it in a new session or with nohup.
    """
    if parent <= 1 or sys.platform == "win32":
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun starts each process in a new session
        return True
    if os.getsid(0) == os.getpid() or _is_under_nohup():
        return False
    try:
        return Path(psutil.Process(parent).exe()).name.lower().startswith("python")
    except psutil.NoSuchProcess:  # the parent is already gone; accelerate leaves these variables
        return any(key.startswith("ACCELERATE_") for key in os.environ)
    except psutil.Error:
        return False


class _Unbroken:
    """A stream whose reader can go away; later output is then lost without an error."""

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
    """A context in which a closed terminal or pipe does not keep the run from saving: its output is lost silently."""
    with contextlib.redirect_stdout(_Unbroken(sys.stdout)), contextlib.redirect_stderr(_Unbroken(sys.stderr)):
        yield

"""Publishing a model or its Space on the Hub: in the background, through outages, and never in the way of training.

The token comes from the environment or from `hf auth login`, by the Hub's client; nothing here sees it.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError


PUBLISHED = (
    "README.md", "model_index.json", "pipeline.py", "*/config.json", "*/scheduler_config.json", "*/cm_diffusers.py",
    "*/*.safetensors", "*/*.safetensors.index.json", "samples/*.png",
)  # fmt: skip
LONGEST_PAUSE = 60.0


def is_passing(error: BaseException) -> bool:
    """Whether trying again can help: the Hub is busy, failing, or out of reach.

    The client itself tries uploads for 23 seconds; making a repository, a commit or a tag it tries once. Where an
    upload fails it raises a RuntimeError with the answer as its cause, and a JSONDecodeError where a gateway answers
    for the Hub.
    """
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 503
        return status in (408, 409, 412, 429) or status >= 500
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return is_passing(error.__cause__)
    return isinstance(error, (httpx2.TransportError, ConnectionError, TimeoutError, JSONDecodeError))


def pause_asked_for(error: BaseException) -> float | None:
    """Seconds by the Retry-After header of an answer, if it has one."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After") if response is not None else None
    return float(value) if value and value.isdigit() else None


def short(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Publisher:
    """Pushes folders to one repository, one after another, in a thread of its own.

    Args:
        repo_id: `user/name`, or `name` for the user whose token it is.
        private: for a repository that has to be made.
        say: prints a line.
        api: the Hub's client.
        space: the repository is a Space, by gradio.
    """

    def __init__(
        self,
        repo_id: str,
        private: bool = False,
        say: Callable[[str], None] = print,
        api: HfApi | None = None,
        space: bool = False,
    ):
        self.repo_id, self.private, self.say, self.api = repo_id, private, say, api or HfApi()
        self.kind = "space" if space else "model"
        self.failures: list[str] = []
        self._jobs: queue.Queue = queue.Queue()
        self._deadline, self._hurry = float("inf"), threading.Event()
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    # --- before training ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """Make the repository. An unreachable Hub is a warning: it may be back when there is something to push.

        Raises:
            ValueError: a name that the Hub does not allow, no token, or one that may not write there.
        """
        try:
            self._create()
        except LocalTokenNotFoundError:
            raise ValueError("push_to_hub needs a token: run `hf auth login`, or set HF_TOKEN.") from None
        except HFValidationError as error:
            raise ValueError(f"hub_model_id {self.repo_id!r}: {short(error)}") from None
        except Exception as error:
            if is_passing(error):
                self.say(
                    f"WARNING: the Hub can't be reached now ({short(error)}); training goes on, pushes are retried."
                )
            elif isinstance(error, HfHubHTTPError):
                raise ValueError(
                    f"hub_model_id {self.repo_id!r} can't be written to: {short(error)} Check the name, and that the"
                    " token (hf auth login, or HF_TOKEN) may write there."
                ) from None
            else:
                raise

    def _create(self) -> None:
        sdk = "gradio" if self.kind == "space" else None
        self.repo_id = self.api.create_repo(
            self.repo_id, private=self.private or None, repo_type=self.kind, exist_ok=True, space_sdk=sdk
        ).repo_id

    # --- while it runs -----------------------------------------------------------------------------------------

    def push(
        self,
        folder: Path,
        message: str,
        tag: str | None = None,
        done: Callable[[], Any] = lambda: None,
        files: Sequence[str] = PUBLISHED,
    ) -> None:
        """Queue those of `files` in `folder` as one commit, with a `tag`; `done` is called in the end."""
        if not self._thread.is_alive():
            self._thread.start()
        self._jobs.put((folder, message, tag, done, files))

    def finish(self, timeout: float) -> bool:
        """Wait for what is queued, at most `timeout` seconds; whether all of it has arrived."""
        self._deadline = time.monotonic() + timeout
        self._hurry.set()
        while self._jobs.unfinished_tasks and time.monotonic() < self._deadline:
            time.sleep(0.05)
        if self._jobs.unfinished_tasks:
            self.failures.append("the time for it is over")
        return not self.failures

    def _work(self) -> None:
        while True:
            folder, message, tag, done, files = self._jobs.get()
            try:
                self._persist(self._create)
                self._persist(self._commit, folder, message, files)
                if tag is not None:
                    self._persist(self.api.create_tag, self.repo_id, tag=tag, repo_type=self.kind, exist_ok=True)
            except Exception as error:  # whatever it is, training is worth more
                self.failures.append(short(error))
                self.say(f"WARNING: {message!r} was not pushed to {self.repo_id}: {short(error)}")
            finally:
                done()
                self._jobs.task_done()

    def _commit(self, folder: Path, message: str, files: Sequence[str]) -> None:
        """One commit of the files; none where the repository holds them already, as after a lost answer."""
        found = sorted(file for pattern in files for file in folder.glob(pattern))
        adds = [CommitOperationAdd(file.relative_to(folder).as_posix(), str(file)) for file in found]
        self.api.create_commit(self.repo_id, adds, commit_message=message, repo_type=self.kind)

    def _persist(self, action: Callable, *args: Any, **kwargs: Any) -> None:
        """Call `action`, again and again while that can help and there is time."""
        pause = 1.0
        while True:
            try:
                action(*args, **kwargs)
                return
            except Exception as error:
                wait = pause_asked_for(error) or pause
                if not is_passing(error) or time.monotonic() + wait > self._deadline:
                    raise
            self._hurry.wait(wait) if not self._hurry.is_set() else time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)

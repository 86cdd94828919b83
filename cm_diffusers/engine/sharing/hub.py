"""Publishing on the Hub: in the background, through outages, and never in the way of training.

Models go to the main branch. What a run resumes from goes to the branch `checkpoint`, of which only the newest state
is kept. The token comes from the environment or from `hf auth login`, by the Hub's client; nothing here sees it.
"""

import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # the library's client: httpx in 1.x, httpx2 in 2.x

from cm_diffusers.engine.checkpoint import DamagedCheckpoint, load_checkpoint
from cm_diffusers.engine.files import headline, remove
from cm_diffusers.lookup import AWAY


PUBLISHED = (
    "README.md", "data.json", "model_index.json", "pipeline.py", "*/config.json", "*/scheduler_config.json",
    "*/cm_diffusers.py", "*/*.safetensors", "*/*.safetensors.index*.json", "samples/*.png",
)  # fmt: skip
CHECKPOINT_BRANCH = "checkpoint"
CHECKPOINT_FILES = ("manifest.json", "state.json", "*.safetensors")
LONGEST_PAUSE = 60.0
NO_TOKEN = (
    "the Hub takes pushes only with a token, and there is none here. Run `hf auth login` (or set HF_TOKEN), then the"
    " same command again."
)


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
    return isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError, JSONDecodeError))


def pause_asked_for(error: BaseException) -> float | None:
    """Seconds by the Retry-After header of an answer, if it has one."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After") if response is not None else None
    return float(value) if value and value.isdigit() else None


@dataclass(frozen=True)
class Push:
    """The files of `folder` that match `files`, as one commit of `branch` with a `tag`; then `done` is called."""

    folder: Path
    message: str
    tag: str | None = None
    branch: str | None = None  # the main one
    files: tuple[str, ...] = PUBLISHED
    done: Callable[[], Any] = lambda: None


class Publisher:
    """Pushes folders to one repository, one after another, in a thread of its own.

    Args:
        repo_id: `user/name`, or `name` for the user whose token it is.
        private: for a repository that has to be made.
        say: prints a line.
        api: the Hub's client.
        kind: of the repository: model, dataset or space (by gradio).
    """

    def __init__(
        self,
        repo_id: str,
        private: bool = False,
        say: Callable[[str], None] = print,
        api: HfApi | None = None,
        kind: str = "model",
    ):
        self.repo_id, self.private, self.say, self.api = repo_id, private, say, api or HfApi()
        self.kind, self.flag = kind, "hub_dataset_id" if kind == "dataset" else "hub_model_id"
        self.failures: list[str] = []
        self._jobs: queue.Queue = queue.Queue()
        self._deadline, self._hurry = float("inf"), threading.Event()
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    # --- before training ---------------------------------------------------------------------------------------

    def check(self, now: bool = False) -> None:
        """Make the repository. An unreachable Hub is a warning: it may be back when there is something to push.

        Args:
            now: there is something to push already, so that an unreachable Hub is an error.

        Raises:
            ValueError: a name that the Hub does not allow, no token, or one that may not write there.
        """
        if self.api.token is None and get_token() is None:
            raise ValueError(NO_TOKEN)
        try:
            self._create()
            self.api.auth_check(self.repo_id, repo_type=self.kind, write=True)  # that it exists is no sign of it
        except LocalTokenNotFoundError:
            raise ValueError(NO_TOKEN) from None
        except HFValidationError as error:
            raise ValueError(f"{self.flag} {self.repo_id!r}: {headline(error)}") from None
        except Exception as error:
            if now and isinstance(error, AWAY):
                raise ValueError(
                    f"the Hub can't be reached ({headline(error)}), so nothing was pushed. Run the same command again"
                    " once the network is back."
                ) from None
            elif is_passing(error):
                self.say(f"WARNING: the Hub can't be reached now ({headline(error)}); pushes will be tried again.")
            elif isinstance(error, HfHubHTTPError):
                raise ValueError(
                    f"{self.flag} {self.repo_id!r} can't be written to: {headline(error)} Check the name, and that the"
                    " token (hf auth login, or HF_TOKEN) may write there."
                ) from None
            else:
                raise

    def check_card(self, card: ModelCard) -> None:
        """Ask the Hub whether it would take `card`; where it can't be reached now, nobody knows.

        Raises:
            ValueError: it would not.
        """
        try:
            self.api._validate_yaml(str(card))
        except ValueError as error:
            raise ValueError(f"the Hub refuses the model card: {error}") from None
        except Exception as error:
            if not is_passing(error):
                raise

    def _create(self) -> None:
        sdk = "gradio" if self.kind == "space" else None
        self.repo_id = self.api.create_repo(
            self.repo_id, private=self.private or None, repo_type=self.kind, exist_ok=True, space_sdk=sdk
        ).repo_id

    # --- while it runs -----------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The page of the repository."""
        return f"{self.api.endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.repo_id}"

    @property
    def waiting(self) -> int:
        """How many pushes have not been done, as the Hub is slow or away."""
        return self._jobs.unfinished_tasks

    def push(self, job: Push) -> None:
        """Queue a push."""
        if not self._thread.is_alive():
            self._thread.start()
        self._jobs.put(job)

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
            job = self._jobs.get()
            try:
                self._persist(self._create)
                if job.branch is not None:
                    self._persist(self.api.create_branch, self.repo_id, branch=job.branch, exist_ok=True)
                self._persist(self._commit, job)
                if job.tag is not None:
                    self._persist(self.api.create_tag, self.repo_id, tag=job.tag, repo_type=self.kind, exist_ok=True)
                if job.branch is not None:  # large files of older commits would be kept for ever
                    self._persist(self.api.super_squash_history, self.repo_id, branch=job.branch)
            except Exception as error:  # whatever it is, training is worth more
                self.failures.append(headline(error))
                self.say(f"WARNING: {job.message!r} was not pushed to {self.repo_id}: {headline(error)}")
            finally:
                job.done()
                self._jobs.task_done()

    def _commit(self, job: Push) -> None:
        """One commit of the files; none where the repository holds them already, as after a lost answer."""
        files = sorted(file for pattern in job.files for file in job.folder.glob(pattern))
        adds = [CommitOperationAdd(file.relative_to(job.folder).as_posix(), str(file)) for file in files]
        self.api.create_commit(
            self.repo_id, adds, commit_message=job.message, repo_type=self.kind, revision=job.branch
        )

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


def fetch_checkpoint(repo_id: str, root: Path, api: HfApi | None = None) -> int:
    """Bring the newest checkpoint that a run left on the Hub to `root`/checkpoint-<step>, verified; gives the step.

    Raises:
        ValueError: the Hub is out of reach, or there is no checkpoint, or a damaged one. Nothing is left then.
    """
    arriving = root / ".tmp-hub"
    remove(arriving)
    try:
        (api or HfApi()).snapshot_download(
            repo_id, revision=CHECKPOINT_BRANCH, allow_patterns=list(CHECKPOINT_FILES), local_dir=arriving / "new"
        )
        checkpoint = load_checkpoint(arriving / "new")
        shutil.rmtree(arriving / "new" / ".cache", ignore_errors=True)
        (arriving / "new").rename(root / f"checkpoint-{checkpoint.step}")
        return checkpoint.step
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise ValueError(
            f"resume_from_hub {repo_id!r} holds no checkpoint, or is not yours to read. Runs with --push_to_hub"
            " --hub_strategy every_save leave one. To start a new run, leave the flag out."
        ) from None
    except HFValidationError as error:
        raise ValueError(f"resume_from_hub {repo_id!r}: {headline(error)}") from None
    except DamagedCheckpoint as error:
        raise ValueError(f"resume_from_hub {repo_id!r}: its checkpoint can't be used: {error}.") from None
    except Exception as error:  # the client raises many kinds; all mean that it is not to be had now
        raise ValueError(
            f"resume_from_hub {repo_id!r}: its checkpoint can't be fetched now: {headline(error)} Try again; nothing"
            " was changed here."
        ) from error
    finally:
        shutil.rmtree(arriving, ignore_errors=True)

"""Publishing on the Hub: in the background, with retries through outages, and without disturbing training.

Models go to the main branch. Checkpoints go to the branch `checkpoint`, which keeps only the newest one. The Hub's
client reads the token from the environment or from `hf auth login`. The code here never sees it.
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
from cm_diffusers.sampling import LORA_FILE


PUBLISHED = (
    "README.md", "data.json", "model_index.json", "pipeline.py", "*/config.json", "*/scheduler_config.json",
    "*/cm_diffusers.py", "*/*.safetensors", "*/*.safetensors.index*.json", "samples/*.png", LORA_FILE,
    "tokenizer*/*.json", "tokenizer*/merges.txt", "feature_extractor/preprocessor_config.json",
)  # fmt: skip
CHECKPOINT_BRANCH = "checkpoint"
CHECKPOINT_FILES = ("manifest.json", "state.json", "*.safetensors")
LONGEST_PAUSE = 60.0
NO_TOKEN = (
    "the Hub accepts pushes only with a token, and no token was found. Run `hf auth login` (or set HF_TOKEN), then run"
    " the same command again."
)


def is_passing(error: BaseException) -> bool:
    """Return whether a retry can help, because the Hub is busy, failing or unreachable.

    The client retries uploads for 23 seconds, but tries to make a repository, commit or tag only once. A failed upload
    raises a RuntimeError with the response as its cause. If a gateway answers for the Hub, the client raises a
    JSONDecodeError.
    """
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 503
        return status in (408, 409, 412, 429) or status >= 500
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return is_passing(error.__cause__)
    return isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError, JSONDecodeError))


def pause_asked_for(error: BaseException) -> float | None:
    """Return the seconds in the Retry-After header of the response of an error; None without one."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After") if response is not None else None
    return float(value) if value and value.isdigit() else None


@dataclass(frozen=True)
class Push:
    """A push: one commit with the files of a folder.

    Args:
        folder: the folder.
        message: message of the commit.
        tag: tag of the commit; None for no tag.
        branch: branch of the commit, whose history is squashed; None for the main branch.
        files: patterns of the files to push.
        done: called after the push, whether it succeeded or not.
    """

    folder: Path
    message: str
    tag: str | None = None
    branch: str | None = None
    files: tuple[str, ...] = PUBLISHED
    done: Callable[[], Any] = lambda: None


class Publisher:
    """Pushes folders to one repository, one after another, in a background thread.

    Args:
        repo_id: `user/name`, or `name` for the user of the token.
        private: make a new repository private.
        say: prints a line.
        api: the Hub's client; None makes one.
        kind: type of the repository: "model", "dataset" or "space" (with gradio).
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
        """Make the repository, and check that the token can write to it.

        An unreachable Hub gives a warning, because it can be back before the first push.

        Args:
            now: a push is due now, so an unreachable Hub is an error.

        Raises:
            ValueError: the name is invalid, the token is missing or can't write there, or `now` is set and the Hub is
                unreachable.
        """
        if self.api.token is None and get_token() is None:
            raise ValueError(NO_TOKEN)
        try:
            self._create()
            self.api.auth_check(self.repo_id, repo_type=self.kind, write=True)  # it can exist and be read-only
        except LocalTokenNotFoundError:
            raise ValueError(NO_TOKEN) from None
        except HFValidationError as error:
            raise ValueError(f"{self.flag} {self.repo_id!r} is not a valid name: {headline(error)}") from None
        except Exception as error:
            if now and isinstance(error, AWAY):
                raise ValueError(
                    f"the Hub can't be reached ({headline(error)}), so nothing was pushed. Run the same command again"
                    " when the network is back."
                ) from None
            elif is_passing(error):
                self.say(f"WARNING: the Hub can't be reached now ({headline(error)}). Pushes will be tried again.")
            elif isinstance(error, HfHubHTTPError):
                raise ValueError(
                    f"{self.flag} {self.repo_id!r} can't be written to: {headline(error).rstrip('.')}. Check the name,"
                    " and that the token (hf auth login, or HF_TOKEN) has write access."
                ) from None
            else:
                raise

    def check_card(self, card: ModelCard) -> None:
        """Ask the Hub to validate `card`. The check is skipped if the Hub is unreachable.

        Raises:
            ValueError: the Hub refuses the card.
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
        """The address of the repository's page."""
        return f"{self.api.endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.repo_id}"

    @property
    def waiting(self) -> int:
        """Number of unfinished pushes, including the current one."""
        return self._jobs.unfinished_tasks

    def push(self, job: Push) -> None:
        """Queue the push `job` and return at once."""
        if not self._thread.is_alive():
            self._thread.start()
        self._jobs.put(job)

    def finish(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for all queued pushes, and return whether every push succeeded."""
        self._deadline = time.monotonic() + timeout
        self._hurry.set()
        while self._jobs.unfinished_tasks and time.monotonic() < self._deadline:
            time.sleep(0.05)
        if self._jobs.unfinished_tasks:
            self.failures.append(f"{self.waiting} pushes were not finished in {timeout:g} s")
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
                if job.branch is not None:  # otherwise large files of older commits are kept for ever
                    self._persist(self.api.super_squash_history, self.repo_id, branch=job.branch)
            except Exception as error:  # no error of a push may stop training
                self.failures.append(headline(error))
                self.say(f"WARNING: {job.message!r} was not pushed to {self.repo_id}: {headline(error)}")
            finally:
                job.done()
                self._jobs.task_done()

    def _commit(self, job: Push) -> None:
        """Commit the files. The Hub makes no commit of unchanged files, for example after a lost response."""
        files = sorted(file for pattern in job.files for file in job.folder.glob(pattern))
        adds = [CommitOperationAdd(file.relative_to(job.folder).as_posix(), str(file)) for file in files]
        self.api.create_commit(
            self.repo_id, adds, commit_message=job.message, repo_type=self.kind, revision=job.branch
        )

    def _persist(self, action: Callable, *args: Any, **kwargs: Any) -> None:
        """Call `action`, and retry while an error can pass and time is left."""
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
    """Download and verify a run's newest checkpoint from the Hub.

    Args:
        repo_id: the repository of the run.
        root: folder that receives the checkpoint, as checkpoint-<step>.
        api: the Hub's client; None makes one.

    Returns:
        The training step of the checkpoint.

    Raises:
        ValueError: the Hub is unreachable, or the checkpoint is missing or damaged. `root` is then left unchanged.
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
            f"resume_from_hub {repo_id!r} holds no checkpoint, or the token can't read it. Runs with --push_to_hub"
            " --hub_strategy every_save push one. To start a new run, leave the flag out."
        ) from None
    except HFValidationError as error:
        raise ValueError(f"resume_from_hub {repo_id!r} is not a valid name: {headline(error)}") from None
    except DamagedCheckpoint as error:
        raise ValueError(f"resume_from_hub {repo_id!r} holds a damaged checkpoint: {error}.") from None
    except Exception as error:  # the client raises many types; each means that the download failed
        raise ValueError(
            f"the checkpoint of resume_from_hub {repo_id!r} can't be fetched now ({headline(error)}). Nothing was"
            " changed here. Try again later."
        ) from error
    finally:
        shutil.rmtree(arriving, ignore_errors=True)

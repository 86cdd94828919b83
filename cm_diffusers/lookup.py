"""What a name means: something here, or on the Hub, which is asked once, as its clients ask for half a minute."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx  # the library's client: httpx in 1.x, httpx2 in 2.x


SECONDS = 5.0  # for an answer
AWAY = (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError)  # the last one where HF_HUB_OFFLINE is set


@contextmanager
def looked_up(name: str, kind: str = "model", revision: str | None = None) -> Iterator[bool]:
    """Load what `name` means within this context, which finds mistakes in it first.

    Gives whether to load from this machine alone: the Hub can't be reached, so that only its cache can have the name.
    A Hub that is busy or slow is left to its clients, which try again.

    Args:
        name: a file or folder, or `user/name` or `name` on the Hub.
        kind: model or dataset.
        revision: a branch, tag or commit on the Hub.

    Raises:
        ValueError: there is nothing of that name; or the Hub can't be reached, and loading raised OSError.
    """
    away = None if Path(name).exists() else _ask(name, kind, revision)
    try:
        yield away is not None
    except OSError:
        if away is None:
            raise
        raise ValueError(
            f"there is no such file or folder, the Hub can't be reached ({away}), and its cache here has no such"
            f" {kind}. Check the name, or the network."
        ) from None


def _ask(name: str, kind: str, revision: str | None) -> str | None:
    """Why the Hub can't be reached, or None. Raises ValueError for what is not there."""
    if name.startswith((".", "~", os.sep)):
        raise ValueError("there is no such file or folder.")
    if kind == "dataset" and name.startswith("buckets/"):  # which are no repositories
        return None
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)
    except HFValidationError:
        raise ValueError(f"there is no such file or folder, and the Hub's {kind}s are called user/name.") from None
    except RevisionNotFoundError:
        raise ValueError(f"the Hub's {kind} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"there is no such file or folder, and no such {kind} on the Hub that you may read. Check the name; a"
            f" private {kind} needs `hf auth login` first."
        ) from None
    except AWAY as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].removesuffix(".")
    except (httpx.HTTPError, ValueError):  # busy, slow, or a gateway that answers for it
        return None
    return None

"""Lookup of a name, as a local path or on the Hub.

The Hub is asked once, with a short timeout, because its own clients retry for half a minute.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx  # the library's client: httpx in 1.x, httpx2 in 2.x


SECONDS = 5.0  # timeout for an answer of the Hub
AWAY = (httpx.ConnectError, httpx.ConnectTimeout, ConnectionError)  # the last one if HF_HUB_OFFLINE is set


@contextmanager
def looked_up(name: str, kind: str = "model", revision: str | None = None) -> Iterator[bool]:
    """Check that `name` exists, then load it within this context.

    The context yields True if the Hub can't be reached, so that only its local cache can have the name. If the Hub is
    busy or slow, the context yields False and leaves retries to the Hub's clients.

    Args:
        name: a file or folder, or `user/name` or `name` on the Hub.
        kind: "model" or "dataset".
        revision: a branch, tag or commit on the Hub.

    Raises:
        ValueError: nothing has that name, or the Hub can't be reached and loading raised OSError.
    """
    away = None if Path(name).exists() else _ask(name, kind, revision)
    try:
        yield away is not None
    except OSError:
        if away is None:
            raise
        raise ValueError(
            f"there is no such file or folder, the Hub can't be reached ({away}), and its local cache has no such"
            f" {kind}. Check the name, or the network."
        ) from None


def _ask(name: str, kind: str, revision: str | None) -> str | None:
    """The reason why the Hub can't be reached, or None.

    Raises:
        ValueError: nothing has that name.
    """
    if name.startswith((".", "~", os.sep)):
        raise ValueError("there is no such file or folder.")
    if kind == "dataset" and name.startswith("buckets/"):  # buckets are not repositories
        return None
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=SECONDS)
    except HFValidationError:
        raise ValueError(
            f"there is no such file or folder, and it is not a name on the Hub, where {kind}s are called user/name."
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"the Hub's {kind} has no revision {revision!r}. Give a branch, tag or commit.") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"there is no such file or folder, and no such {kind} on the Hub that you can read. Check the name. A"
            f" private {kind} needs `hf auth login` first."
        ) from None
    except AWAY as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].removesuffix(".")
    except (httpx.HTTPError, ValueError):  # busy, slow, or a gateway that answers instead of the Hub
        return None
    return None

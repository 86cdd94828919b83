"""The process that started this one, read at the first import, as it can end during the imports that follow."""

import os


_SEEN = os.getpid(), os.getppid()


def parent() -> int:
    """Id of the process that started this one, even if it has ended."""
    process, its_parent = _SEEN
    return its_parent if os.getpid() == process else os.getppid()  # this process was forked after the import

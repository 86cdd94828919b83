"""Which process started this one: asked at the first import, as that process may end during those that follow."""

import os


_SEEN = os.getpid(), os.getppid()


def parent() -> int:
    """The process that started this one, whether it is still there or not."""
    process, its_parent = _SEEN
    return its_parent if os.getpid() == process else os.getppid()  # forked since

"""Moments of a run at which a disk can become full, and ways to fill or limit it."""

import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import cm_diffusers.engine.data.images as data
import cm_diffusers.engine.training.product as product
import cm_diffusers.engine.training.run as run
import cm_diffusers.engine.training.trainer as loop
from cm_diffusers.engine.training.run import main


# output: (holder and name of a function, which of its calls is the moment, True if the moment follows the call)
MOMENTS = {
    "images_checked.safetensors": (data, "save_scan", 1, False),
    "config.yaml": (loop.Trainer, "resume", 1, True),
    "log.jsonl": (loop.Trainer, "_log", 2, False),
    "model.safetensors": (loop, "save_checkpoint", 1, False),
    "step-0000006.png": (product, "save_preview", 1, False),
    "losses.png": (loop, "plot_losses", 1, False),
    "pipeline": (product, "save_pipeline", 1, False),
    "card.json": (run, "replace_file", 3, False),
    "exported.json": (run, "replace_file", 4, False),
}


@contextmanager
def at(moment, happen):
    """Context that calls `happen()` once, at the `moment` (a key of `MOMENTS`) of a run."""
    holder, name, nth, afterwards = MOMENTS[moment]
    real, calls = getattr(holder, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == nth and not afterwards:
            happen()
        result = real(*args, **kwargs)
        if len(calls) == nth and afterwards:
            happen()
        return result

    with mock.patch.object(holder, name, wrapped):
        yield
    assert len(calls) >= nth, "the moment never came"


def train(words, method="ect"):
    """Run training with the flags `words` in this process, without export checks or grids; returns the exit code."""
    verify = "cm_diffusers.engine.saved.export.verify_export"
    with mock.patch(verify), mock.patch.object(product, "draw_grids", return_value={}):
        try:
            main(words, [method], "")
        except SystemExit as ended:
            return ended.code
    return 0


@contextmanager
def file_sizes_limited_later():
    """Yield a function. Once it is called, no file of this process can grow until the context ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Disk:
    """A small tmpfs mounted at `root`; `there` is False if the system does not allow the mount."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir()
        options = ["-t", "tmpfs", "-o", "size=96m,nr_inodes=400", "tmpfs"]
        self.there = subprocess.run(["mount", *options, str(root)], capture_output=True).returncode == 0

    def fill(self):
        with open(self.root / "filler", "ab", 0) as file:
            for size in (1 << 20, 4096, 1):
                self._until_full(lambda size=size: file.write(b"x" * size))

    def take_all_files(self):
        (self.root / "fillers").mkdir()
        names = (self.root / "fillers" / str(i) for i in range(1000))
        self._until_full(lambda: next(names).touch())

    def _until_full(self, write):
        try:
            while True:
                write()
        except OSError:
            pass

    def free(self):
        (self.root / "filler").unlink(missing_ok=True)
        shutil.rmtree(self.root / "fillers", ignore_errors=True)

    def close(self):
        if self.there:
            subprocess.run(["umount", str(self.root)], check=True)

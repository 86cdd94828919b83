"""Time and memory of the first pass over a folder of PNG images, and of a second start of the same run.

    python benchmarks/scan.py [--against CHECKOUT] [--images 5000] [--side 64] [--runs 5]

Every start is a fresh process. Every run has a separate folder for its scan results and for the cache of the datasets
library. With --against, the two checkouts take turns, and the script prints the ratios of their medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image


ROOT = Path(__file__).resolve().parent.parent
READ = """
import json, resource, sys, time
from pathlib import Path
import datasets
datasets.disable_progress_bars()
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
folder, scanned = sys.argv[1:]
start, used = time.perf_counter(), time.process_time()
data = ImageData(DataArguments(train_data_dir=folder), True, Path(scanned), show_progress=False)
seconds, used = time.perf_counter() - start, time.process_time() - used
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, used, peak / 1024, len(data.images), data.num_classes]))
"""


def make_images(folder: Path, number: int, side: int) -> None:
    """Write images of noise over a ramp, in ten class folders."""
    rng = np.random.default_rng(0)
    ramp = np.indices((side, side)).sum(0)[..., None] * (128 / side)
    for i in range(number):
        file = folder / f"class {i % 10}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 64, (side, side, 3)) + ramp * rng.random(3)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file)


def read(checkout: Path, folder: Path, home: Path) -> list[float]:
    """Wall-clock seconds and CPU seconds of one pass, and the peak memory of the process in MiB."""
    env = {**os.environ, "PYTHONPATH": str(checkout), "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ, str(folder), str(home / "images_checked")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=checkout)
    *figures, number, classes = json.loads(run.stdout.splitlines()[-1])
    assert (number, classes) == (sum(1 for _ in folder.rglob("*.png")), 10), (number, classes)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of the project, for comparison")
    parser.add_argument("--images", type=int, default=5000, help="number of images (default: 5000)")
    parser.add_argument("--side", type=int, default=64, help="height and width in pixels (default: 64)")
    parser.add_argument("--runs", type=int, default=5, help="measured runs per checkout (default: 5)")
    args = parser.parse_args()
    checkouts = {"this": ROOT, **({"other": args.against.resolve()} if args.against else {})}
    found = {(name, start): [] for name in checkouts for start in ("first", "second")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        make_images(folder, args.images, args.side)
        for run in range(args.runs + 1):
            for name, checkout in checkouts.items():
                home = Path(temporary) / f"{name}-{run}"
                home.mkdir()
                for start in ("first", "second"):
                    figures = read(checkout, folder, home)
                    if run:  # the first run only fills the machine's file cache
                        found[name, start].append(figures)
    medians = {}
    for (name, start), figures in found.items():
        wall, used, peak = medians[name, start] = [statistics.median(column) for column in zip(*figures)]
        print(f"{name:>5}, {start:>6} start: {wall:.2f} s, CPU time {used:.2f} s, {peak:.0f} MiB")
    compare("second start / first start", medians["this", "second"], medians["this", "first"])
    if args.against:
        compare("first start, this / other", medians["this", "first"], medians["other", "first"])


def compare(what: str, a: list[float], b: list[float]) -> None:
    """Print the ratios of two measurements."""
    wall, used, peak = (x / y for x, y in zip(a, b))
    print(f"{what}: time {wall:.2f}, CPU time {used:.2f}, memory {peak:.2f}")


if __name__ == "__main__":
    main()

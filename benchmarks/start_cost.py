"""Time to start: imports, `--help`, and the first image of a saved model, each in a new process.

    python benchmarks/start_cost.py [--against CHECKOUT] [--rounds 5]

The model is a stock `ConsistencyModelPipeline` with a U-Net of the preset `small`, saved once. diffusers' own class
and ours load it and make one image in one step. With --against, another checkout of the project does the same. All
tasks take turns.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import show
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

from cm_diffusers.models import build_unet


IMAGE = "{cls}.from_pretrained({folder!r})(batch_size=1, num_inference_steps=1).images[0]"
HELP = ["training/train_consistency.py", "--help"]
OURS = "ConsistencyPipeline"
ROOT = Path(__file__).resolve().parents[1]


def tasks(folder: str) -> dict[str, list[str]]:
    """Command-line arguments of Python for each task."""
    stock = "ConsistencyModelPipeline"
    return {
        "import diffusers": ["-c", "import diffusers"],
        "import both": ["-c", "import cm_diffusers, diffusers"],
        "--help": HELP,
        "first image, diffusers": ["-c", f"from diffusers import {stock}\n{IMAGE.format(cls=stock, folder=folder)}"],
        "first image, ours": ["-c", f"from cm_diffusers import {OURS}\n{IMAGE.format(cls=OURS, folder=folder)}"],
    }


def seconds(words: list[str], checkout: Path) -> float:
    """Seconds that Python takes with these arguments in a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=checkout, env=environment, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of the project, for comparison")
    parser.add_argument("--rounds", type=int, default=5, help="measured processes per task (default: 5)")
    args = parser.parse_args()
    checkouts = {"this": ROOT, **({"other": args.against.resolve()} if args.against else {})}
    with tempfile.TemporaryDirectory() as folder:
        unet = build_unet("small", (28, 28), 1, None)
        ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(folder)
        times = {(name, build): [] for name in tasks(folder) for build in checkouts}
        for turn in range(args.rounds + 1):
            for name, build in times:
                taken = seconds(tasks(folder)[name], checkouts[build])
                if turn:  # the first round only fills the disk's caches
                    times[name, build].append(taken)
    middle = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    rows = {}
    for build in checkouts:
        own = {name: round(middle[name, build], 3) for name in tasks("")}
        rows[build] = own | {
            "imports of both / import of diffusers": round(own["import both"] / own["import diffusers"], 3),
            "first image, ours / diffusers": round(own["first image, ours"] / own["first image, diffusers"], 3),
        }
    show(rows)


if __name__ == "__main__":
    main()

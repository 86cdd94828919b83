"""Time to save a checkpoint, including the checks before, and to verify and read it.

    python benchmarks/checkpoint_cost.py [--against CHECKOUT] [--megabytes 300] [--rounds 10]

A checkpoint has four groups of tensors of equal size, like the weights, two moments of the optimiser and an EMA. With
--against, the two checkouts take turns in separate processes, and the script prints the ratios of their medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
SAVE_AND_LOAD = """
import json, sys, time
from pathlib import Path
import torch
from cm_diffusers.engine.checkpoint import load_checkpoint, save_checkpoint
try:
    from cm_diffusers.engine.training.divergence import breakage, is_sound
except ImportError:  # an older checkout, which has no such checks
    breakage = is_sound = None
folder, megabytes, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
parts, size = 100, megabytes * 250_000 // 400
group = lambda: {str(i): torch.randn(size) for i in range(parts)}
tensors = {"model": group(), "optimizer": {**group(), **{f"{i}.v": torch.rand(size) for i in range(parts)}}}
tensors["ema"] = {name: value.clone() for name, value in tensors["model"].items()}
times = []
for step in range(rounds):
    start = time.perf_counter()
    if breakage:
        assert not breakage(tensors["model"], 1e4) and is_sound(tensors, "ema", 1e4, 0)
    save_checkpoint(folder, step, tensors, {})
    saved = time.perf_counter()
    load_checkpoint(folder / f"checkpoint-{step}")
    times.append([saved - start, time.perf_counter() - saved])
print(json.dumps(times))
"""


def run(checkout: Path, megabytes: int) -> list[list[float]]:
    """Seconds to save and seconds to read, for each round but the first."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SAVE_AND_LOAD, folder, str(megabytes), "4"]
        env = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=checkout)
    return json.loads(done.stdout.splitlines()[-1])[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of the project, for comparison")
    parser.add_argument("--megabytes", type=int, default=300, help="size of the checkpoint (default: 300)")
    parser.add_argument("--rounds", type=int, default=10, help="processes per checkout (default: 10)")
    args = parser.parse_args()
    checkouts = {"this": ROOT, **({"other": args.against.resolve()} if args.against else {})}
    found = {name: [] for name in checkouts}
    for _ in range(args.rounds):
        for name, checkout in checkouts.items():
            found[name] += run(checkout, args.megabytes)
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in found.items()}
    for name, (save, read) in medians.items():
        print(f"{name:>5}: save {save:.3f} s, verify and read {read:.3f} s")
    if args.against:
        save, read = (a / b for a, b in zip(medians["this"], medians["other"]))
        print(f"this / other: save {save:.2f}, verify and read {read:.2f}")


if __name__ == "__main__":
    main()

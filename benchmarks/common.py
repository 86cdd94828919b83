"""Paired timings: the whole and its parts take turns in one run, so that changes of the machine's speed cancel.

On one thread without a GPU, the clock is the CPU time of the process, which other programs on the core don't affect.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Seconds per call, as the mean of `repeats` consecutive calls."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    start = clock()
    for _ in range(repeats):
        function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def paired(whole: Callable[[], object], parts: dict[str, Callable[[], object]], rounds: int, repeats: int = 1) -> dict:
    """Medians over `rounds`: milliseconds of the whole and of each part, and whole / sum of parts with quartiles."""
    functions = {"whole": whole, **parts}
    for function in functions.values():
        seconds(function, 2)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            times[name].append(seconds(functions[name], repeats))
    ratios = [w / sum(t) for w, *t in zip(times["whole"], *(times[name] for name in parts))]
    low, ratio, high = (round(q, 3) for q in statistics.quantiles(ratios, n=4))
    report = {f"{name}_ms": round(1000 * statistics.median(values), 2) for name, values in times.items()}
    return report | {"ratio": ratio, "ratio_quartiles": [low, high]}


def show(rows: dict[str, dict]) -> None:
    """Print the rows as JSON, with a description of the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({"machine": machine, **rows}, indent=2))

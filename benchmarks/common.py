"""Timings. Paired ones take turns in one run, the whole and its parts, so that changes of the machine's speed cancel.

On one thread without a GPU, the clock is the CPU time of the process, which other programs on the core don't affect.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch


CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], repeats: int = 8, warm: int = 2) -> float:
    """Of a call, of which `repeats` run one after the other, as in training; only the last is waited for."""
    for _ in range(warm):
        function()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return round(1000 * (time.perf_counter() - start) / repeats, 3)


def host_milliseconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Until a call returns, if the device has nothing else to do: the median of `repeats` calls."""
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 3)


def peak_gib(function: Callable[[], object]) -> float | None:
    """Peak memory of a call on the GPU."""
    if not CUDA:
        return None
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronize()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Autocast to "bf16" or "fp16", or float32 with TF32 ("tf32") or without ("no")."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = name != "no"
    try:
        with torch.autocast(DEVICE.type, DTYPES[name]) if name in DTYPES else nullcontext():
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def show(rows: dict[str, dict]) -> None:
    """Print the rows as JSON, with a description of the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({"machine": machine, **rows}, indent=2))

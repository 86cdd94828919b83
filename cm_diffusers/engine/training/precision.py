"""The arithmetic of a run: its precision, the forward pass that Accelerate casts, and whether it repeats its bits."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cm_diffusers.engine.config import RunArguments
from cm_diffusers.objectives import Objective


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # read by cuBLAS at its start
UNSAID = (None, "no")  # accelerate launch also sets "no" if the user gives no precision


def choose_precision(method: type[Objective], asked: str | None) -> tuple[str, str | None]:
    """Choose the `mixed_precision` of the `Accelerator`, and a warning if the user's bf16 harms the method.

    The defaults are:

    - without a GPU, or with ACCELERATE_USE_CPU set: float32;
    - for a method that compares neighbouring noise levels: fp16, which has the 11 significant bits that it needs;
    - for any other method: bf16, which needs no loss scaling, or fp16 on a GPU without bf16.

    Args:
        method: the training method.
        asked: the setting of the run; None for the value given to the launcher, or else the default.
    """
    told = asked
    if told is None and (launcher := os.environ.get("ACCELERATE_MIXED_PRECISION")) not in UNSAID:
        told = launcher
    if told is None:
        if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return "no", None
        return ("fp16" if method.compares_neighbours or not torch.cuda.is_bf16_supported() else "bf16"), None
    if told == "bf16" and method.compares_neighbours:
        return told, (
            f"{method.name} compares the network's outputs at neighbouring noise levels, and bf16 rounds their"
            " difference away. In the last stage, the cosine of the bf16 and float32 gradients was 0.81 for ECT and"
            " 0.64 for iCT; with fp16 it was 0.99 and 0.98. Leave --mixed_precision out (fp16 on a GPU), or give"
            " --mixed_precision no for float32."
        )
    return told, None


def check_device(precision: str, device: torch.device) -> None:
    """Check that `device` computes in `precision`.

    Raises:
        ValueError: fp16 on a CPU, where Accelerate would compute in float32 without a word.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision fp16 needs a GPU. On a CPU leave it out, which means float32, or give bf16.")


@contextmanager
def arithmetic(run: RunArguments) -> Iterator[None]:
    """A context in which GPUs compute as `run` asks. Enter it before CUDA starts; its end restores torch's settings.

    With `deterministic`, every operation has an algorithm that repeats its bits; torch raises RuntimeError for an
    operation that has none. Otherwise cuDNN times its algorithms and takes the fastest, and TF32 is as `allow_tf32`
    says.
    """
    cudnn, matmul, exact = torch.backends.cudnn, torch.backends.cuda.matmul, run.deterministic
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE)
    tf32 = run.allow_tf32 and not exact
    try:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = not exact, exact, tf32, tf32
        if exact:
            os.environ.setdefault(WORKSPACE, ":4096:8")
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


class CastPass(nn.Module):
    """A wrapper whose forward pass Accelerate casts to the mixed precision.

    Direct calls of `network` compute in the precision of its weights, float32. Tangents call it so, compiled or not.

    Args:
        network: the network to train.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    @property
    def adapt_condition(self) -> Any:
        """The `adapt_condition` of the network; AttributeError if the network has no such attribute."""
        return self.network.adapt_condition

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with these arguments."""
        return self.network(*args, **kwargs)

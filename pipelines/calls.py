"""What belongs to one call of a pipeline: the scheduler that it steps, and whether it was told to stop.

Each call has its own, so that threads that share a pipeline, and calls in the callback of another, can't disturb each
other. Within a call, and in its callback, the pipeline's `scheduler` is that of the call.
"""

import copy
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin


class Call:
    """A call of `pipeline` with a copy of `scheduler`.

    Args:
        pipeline: whose call it is.
        scheduler: its own one, which no step changes.
        stops: how often all calls of the pipeline were told to stop before this one began.
    """

    def __init__(self, pipeline: DiffusionPipeline, scheduler: SchedulerMixin, stops: int):
        self.pipeline, self.stops, self.stopped = pipeline, stops, False
        self.device: torch.device | None = None  # where it runs and in what, once that was asked for
        self.dtype: torch.dtype | None = None
        self.own_scheduler = scheduler
        self.scheduler = copy.copy(scheduler)  # whose `set_timesteps` makes all that steps change

    def show_levels(self) -> None:
        """Let the pipeline's own scheduler show the levels of this call, and keep its settings."""
        shown = {name: value for name, value in vars(self.scheduler).items() if name != "_internal_dict"}
        vars(self.own_scheduler).update(shown)


_running: ContextVar[tuple[Call, ...]] = ContextVar("running", default=())  # in this thread, the innermost one last


def current_call(pipeline: DiffusionPipeline) -> Call | None:
    """The innermost call of `pipeline` that this code is run by; None outside of all."""
    return next((call for call in reversed(_running.get()) if call.pipeline is pipeline), None)


def one_call(method: Callable) -> Callable:
    """Let a method of an `ImagePipeline` be a call; afterwards the pipeline's own scheduler shows its levels."""

    @functools.wraps(method)
    def run(pipeline: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        call = pipeline.new_call()
        token = _running.set((*_running.get(), call))
        try:
            result = method(pipeline, *args, **kwargs)
        finally:
            _running.reset(token)
        call.show_levels()
        return result

    return run

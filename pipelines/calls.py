"""The state of one pipeline call: the scheduler that it steps, and whether it was asked to stop.

Each call has a state of its own. Calls in several threads, or in the callback of another call, therefore can't disturb
each other. During a call and in its callback, the pipeline's `scheduler` is that of the call.
"""

import copy
import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin


class Call:
    """One call of a pipeline, with a copy of its scheduler.

    Args:
        pipeline: the pipeline that is called.
        scheduler: the pipeline's own scheduler. The call copies it, and steps only the copy.
        stops: how many requests to stop all calls of the pipeline were made before this call began.
    """

    def __init__(self, pipeline: DiffusionPipeline, scheduler: SchedulerMixin, stops: int):
        self.pipeline, self.stops, self.stopped = pipeline, stops, False
        self.device: torch.device | None = None  # device and dtype of the network, from the first query on
        self.dtype: torch.dtype | None = None
        self.own_scheduler = scheduler
        self.scheduler = copy.copy(scheduler)  # shallow: `set_timesteps` renews all that steps change

    def show_levels(self) -> None:
        """Copy the levels of this call to the pipeline's own scheduler, which keeps its settings."""
        shown = {name: value for name, value in vars(self.scheduler).items() if name != "_internal_dict"}
        vars(self.own_scheduler).update(shown)


_running: ContextVar[tuple[Call, ...]] = ContextVar("running", default=())  # calls of this thread, the innermost last


def current_call(pipeline: DiffusionPipeline) -> Call | None:
    """Return the innermost call of `pipeline` that is in progress in this thread, or None."""
    return next((call for call in reversed(_running.get()) if call.pipeline is pipeline), None)


def one_call(method: Callable) -> Callable:
    """Give each call of `method`, a method of an `ImagePipeline`, a state of its own.

    After the call, the pipeline's own scheduler shows the levels of the call.
    """

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

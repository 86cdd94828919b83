"""Which schedulers a pipeline samples with, and what they say of the network that they belong to."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ModelMixin, SchedulerMixin


NETWORK_KEY = "_network"  # of settings without the underscore that a class does not know, diffusers warns at each load
SAMPLED_BY = {  # by their schedulers the kinds of models, and the pipelines that sample them
    "CMStochasticIterativeScheduler": ("a consistency model", "ConsistencyPipeline"),
    "MultistepConsistencyScheduler": ("a consistency model", "ConsistencyPipeline"),
    "CTMScheduler": ("a consistency trajectory model", "CTMPipeline"),
    "TrigFlowScheduler": ("a TrigFlow model", "TrigFlowPipeline"),
    "EDMEulerScheduler": ("a diffusion or flow model", "DenoisingPipeline"),
    "FlowMatchEulerDiscreteScheduler": ("a mean flow, if its network has two times", "MeanFlowPipeline"),
}


def takes_two_times(unet: ModelMixin) -> bool:
    """Whether `unet` can be told where to jump to."""
    parameters = inspect.signature(unet.forward).parameters
    return "target_timestep" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def is_a(scheduler: Any, name: str) -> bool:
    """Whether `scheduler` is of the class `name` or of one made from it, wherever that was loaded from."""
    return name in [cls.__name__ for cls in type(scheduler).__mro__]


def check_scheduler(pipeline: str, scheduler: Any, allowed: Sequence[str], hint: str | None = None) -> None:
    """Raise ValueError for a scheduler of none of the classes called `allowed`, with a hint at who samples with it."""
    if any(is_a(scheduler, name) for name in allowed):
        return
    given = type(scheduler).__name__
    if hint is None:
        kind, other = SAMPLED_BY.get(given, ("", pipeline))
        hint = f" By its scheduler this is {kind}, which {other} samples." if other != pipeline else ""
    names = " or ".join(f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in allowed)
    raise ValueError(f"{pipeline} needs {names}, not {'an' if given[0] in 'AEIOU' else 'a'} {given}.{hint}")


def settings_of(scheduler: SchedulerMixin, **given: Any) -> dict[str, Any]:
    """Settings of a network: what `saying` told its `scheduler`, and those that are given and not None.

    Raises:
        ValueError: they differ.
    """
    said = getattr(scheduler, "config", {}).get(NETWORK_KEY) or {}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in said.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"The scheduler was made for a network with {name}={value!r}, and this one's is {given[name]!r}; leave"
                " that out, or use a scheduler that says nothing of its network."
            )
    return {**said, **given}


def saying(scheduler: SchedulerMixin, settings: Mapping[str, Any]) -> SchedulerMixin:
    """`scheduler` with `settings` of its network in its config, for whoever makes a pipeline of the same parts.

    It is the same one where it says so already, else a copy, as other pipelines may have it, too.

    Raises:
        ValueError: it says something else.
    """
    settings_of(scheduler, **settings)
    if scheduler.config.get(NETWORK_KEY) != settings:
        scheduler = copy.copy(scheduler)
        scheduler.register_to_config(**{NETWORK_KEY: dict(settings)})
    return scheduler

"""The schedulers that each pipeline accepts, and settings of the network in a scheduler's config."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ModelMixin, SchedulerMixin


NETWORK_KEY = "_network"  # without the underscore, diffusers would warn of an unknown setting at each load
SAMPLED_BY = {  # scheduler: (kind of model, pipeline)
    "CMStochasticIterativeScheduler": ("a consistency model", "ConsistencyPipeline"),
    "MultistepConsistencyScheduler": ("a consistency model", "ConsistencyPipeline"),
    "CTMScheduler": ("a consistency trajectory model", "CTMPipeline"),
    "TrigFlowScheduler": ("a TrigFlow model", "TrigFlowPipeline"),
    "EDMEulerScheduler": ("a diffusion or flow model", "DenoisingPipeline"),
    "FlowMatchEulerDiscreteScheduler": ("a MeanFlow model, if the network has two times", "MeanFlowPipeline"),
}


def takes_two_times(unet: ModelMixin) -> bool:
    """Return whether the forward method of `unet` accepts a `target_timestep`, the time to jump to."""
    parameters = inspect.signature(unet.forward).parameters
    return "target_timestep" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def is_a(scheduler: Any, name: str) -> bool:
    """Return whether `scheduler` is of the class `name` or a subclass, also if loaded from a saved folder."""
    return name in [cls.__name__ for cls in type(scheduler).__mro__]


def check_scheduler(pipeline: str, scheduler: Any, allowed: Sequence[str], hint: str | None = None) -> None:
    """Refuse a scheduler that a pipeline can't use.

    Args:
        pipeline: the name of the pipeline's class.
        scheduler: the scheduler to check.
        allowed: names of the allowed classes, whose subclasses are allowed as well.
        hint: the end of the error message; by default it names the pipeline for `scheduler`, if one is known.

    Raises:
        ValueError: `scheduler` is of none of the allowed classes.
    """
    if any(is_a(scheduler, name) for name in allowed):
        return
    given = type(scheduler).__name__
    if hint is None:
        kind, other = SAMPLED_BY.get(given, ("", pipeline))
        hint = f" It belongs to {kind}: use {other}." if other != pipeline else ""
    names = " or ".join(f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in allowed)
    raise ValueError(f"{pipeline} needs {names}, not {'an' if given[0] in 'AEIOU' else 'a'} {given}.{hint}")


def settings_of(scheduler: SchedulerMixin, **given: Any) -> dict[str, Any]:
    """Return the settings of a network: those that `saying` stored in the config of `scheduler`, and the `given` ones.

    Args:
        scheduler: the scheduler of the network.
        **given: further settings; None means not given.

    Raises:
        ValueError: a given setting differs from the stored one.
    """
    said = getattr(scheduler, "config", {}).get(NETWORK_KEY) or {}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in said.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"The scheduler was made for a network with {name}={value!r}, and this one's is {given[name]!r}. Leave"
                f" {name} out, or use a new scheduler."
            )
    return {**said, **given}


def saying(scheduler: SchedulerMixin, settings: Mapping[str, Any]) -> SchedulerMixin:
    """Store the `settings` of a network in the config of its `scheduler`, for other pipelines with the same parts.

    Returns:
        The given scheduler if its config has these settings already. Otherwise a copy, because other pipelines can
        share the given one.

    Raises:
        ValueError: the config has other settings of a network.
    """
    settings_of(scheduler, **settings)
    if scheduler.config.get(NETWORK_KEY) != settings:
        scheduler = copy.copy(scheduler)
        scheduler.register_to_config(**{NETWORK_KEY: dict(settings)})
    return scheduler

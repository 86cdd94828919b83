"""Optimisers with their state as plain tensors, and the learning rate as a pure function of the step."""

import importlib
import inspect
from dataclasses import fields
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from cm_diffusers.core.radam import RAdam
from cm_diffusers.engine.config import RunArguments


NAMED = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": RAdam}
NUMBERS = {kind.__name__: kind for kind in (bool, int, float)}


def build_optimizer(network: nn.Module, run: RunArguments) -> torch.optim.Optimizer:
    """Create the optimiser of `run` for all parameters of `network` that require a gradient.

    Raises:
        ValueError: the optimiser class does not exist, or it does not accept a setting that was given.
    """
    cls = optimizer_class(run.optimizer)
    betas, decay = (run.adam_beta1, run.adam_beta2), run.adam_weight_decay
    settings = {"lr": run.learning_rate, "betas": betas, "eps": run.adam_epsilon, "weight_decay": decay}
    settings["fused" if run.optimizer in NAMED else "foreach"] = True  # fewer calls than some for each tensor
    known = inspect.signature(cls).parameters
    if not any(part.kind is part.VAR_KEYWORD for part in known.values()):
        _check_taken(cls, known, run)
        settings = {name: value for name, value in settings.items() if name in known}
    try:
        return cls([weight for weight in network.parameters() if weight.requires_grad], **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"optimizer {run.optimizer!r} can't be created: {error}") from error


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimiser class for the value `name` of `--optimizer`: adam, adamw, radam, or module:Class.

    Raises:
        ValueError: the module can't be imported, lacks the class, or the class is not a torch optimiser.
    """
    if name in NAMED:
        return NAMED[name]
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing a package can raise anything
        package = module.partition(".")[0]
        raise ValueError(
            f"optimizer {name!r} can't be imported: {error}. If it is missing, `pip install {package}`."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(
            f"optimizer {name!r} is not a torch.optim.Optimizer. Give {', '.join(NAMED)} or module:Class."
        )
    return cls


def _check_taken(cls: type, known: Any, run: RunArguments) -> None:
    """Raise ValueError if the run sets a parameter of Adam that the optimiser class does not accept."""
    takes = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",), "weight_decay": ("adam_weight_decay",)}
    default = {part.name: part.default for part in fields(run)}
    for argument, names in takes.items():
        for name in names:
            if argument not in known and getattr(run, name) != default[name]:
                raise ValueError(f"{name} has no effect: {cls.__name__} has no argument {argument}. Leave {name} out.")


def step_unless(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Take a step of an optimiser, or none.

    Optimisers of one kernel, as `NAMED`, decide on the device. Others wait for it.

    Args:
        optimizer: the optimiser, with gradients.
        skipped: () bool, whether the step is skipped. It then changes nothing.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # the interface of gradient scalers
        optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
        optimizer.step()
    elif not skipped.item():
        optimizer.step()


class LearningRate:
    """A diffusers learning-rate schedule as a function of the step, without state.

    Calling it with a `step`, counted from 0, gives the learning rate of that step. During warm-up the value of the
    next step is taken, so that the first step also changes the weights.

    Args:
        run: the settings: peak learning rate, schedule, warm-up and number of steps.
    """

    def __init__(self, run: RunArguments):
        run = run.resolved(run.max_train_steps)
        self.peak, self.warmup_steps = run.learning_rate, run.lr_warmup_steps
        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=run.learning_rate)
        self._factor = get_scheduler(
            run.lr_scheduler,
            unused,
            step_rules=run.lr_step_rules,
            num_warmup_steps=run.lr_warmup_steps,
            num_training_steps=run.max_train_steps,
            num_cycles=run.lr_num_cycles,
            power=run.lr_power,
        ).lr_lambdas[0]

    def __call__(self, step: int) -> float:
        return self.peak * self._factor(step + 1 if step < self.warmup_steps else step)  # never 0 at the first step


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as a dictionary of tensors (any shape) for a checkpoint.

    - Tensors are named `<index>.<name>`, with the index of their parameter.
    - Numbers are named `<index>.<type>:<name>`.
    - Changed numbers of parameter groups are named `group<index>.<type>:<name>`. Prodigy keeps its estimates there.

    The learning rate is left out.

    Raises:
        ValueError: the state holds a value that is neither a tensor nor a number.
    """
    found, state = {}, optimizer.state_dict()
    for index, values in state["state"].items():
        for name, value in values.items():
            found |= _as_tensor(str(index), name, value, optimizer)
    for index, group in enumerate(state["param_groups"]):
        for name, value in group.items():
            if name != "lr" and type(value) in NUMBERS.values() and value != optimizer.defaults.get(name):
                found |= _as_tensor(f"group{index}", name, value, optimizer)
    return found


def _as_tensor(place: str, name: str, value: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    if torch.is_tensor(value):
        return {f"{place}.{name}": value}
    if value is None:
        return {}
    if type(value) not in NUMBERS.values():
        raise ValueError(
            f"optimizer {type(optimizer).__name__} keeps {name!r} as a {type(value).__name__}, but checkpoints can"
            " hold only tensors and numbers. Choose another --optimizer."
        )
    kind = torch.float64 if type(value) is float else torch.int64
    return {f"{place}.{type(value).__name__}:{name}": torch.tensor(value, dtype=kind)}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load a state into `optimizer` from `tensors` (any shape), named as `optimizer_tensors` does."""
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    for key, tensor in tensors.items():
        place, name = key.split(".", 1)
        kind, is_number, number_name = name.partition(":")
        value = NUMBERS[kind](tensor.item()) if is_number else tensor
        name = number_name if is_number else name
        if place.startswith("group"):
            groups[int(place[5:])][name] = value
        else:
            state.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})

"""Optimisers, the learning rate as a pure function of the step, and optimiser state as plain tensors."""

import importlib
import inspect
from dataclasses import fields
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from cm_diffusers.engine.config import RunArguments


NAMED = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
NUMBERS = {kind.__name__: kind for kind in (bool, int, float)}


def build_optimizer(network: nn.Module, run: RunArguments) -> torch.optim.Optimizer:
    """The optimiser that `run` names, over all parameters of `network`.

    Raises:
        ValueError: there is no such class, or it does not take a setting that was given.
    """
    cls = optimizer_class(run.optimizer)
    betas, decay = (run.adam_beta1, run.adam_beta2), run.adam_weight_decay
    settings = {"lr": run.learning_rate, "betas": betas, "eps": run.adam_epsilon, "weight_decay": decay}
    settings["foreach"] = True  # fewer calls than one by one, on a CPU as well
    known = inspect.signature(cls).parameters
    if not any(part.kind is part.VAR_KEYWORD for part in known.values()):
        _check_taken(cls, known, run)
        settings = {name: value for name, value in settings.items() if name in known}
    try:
        return cls(network.parameters(), **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"optimizer {run.optimizer!r} can't be made: {error}") from error


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of `--optimizer`. Raises ValueError where there is none of the name."""
    if name in NAMED:
        return NAMED[name]
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of another package's import
        package = module.partition(".")[0]
        raise ValueError(
            f"optimizer {name!r} can't be imported: {error}. If it is missing, `pip install {package}`."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ValueError(f"optimizer {name!r} is no torch.optim.Optimizer.")
    return cls


def _check_taken(cls: type, known: Any, run: RunArguments) -> None:
    """Raise ValueError where a setting of Adam was given to what does not take it."""
    takes = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_epsilon",), "weight_decay": ("adam_weight_decay",)}
    default = {part.name: part.default for part in fields(run)}
    for argument, names in takes.items():
        for name in names:
            if argument not in known and getattr(run, name) != default[name]:
                raise ValueError(f"{name} has no effect: {cls.__name__} takes no {argument}.")


class LearningRate:
    """diffusers' learning-rate schedules, called with the step: nothing of them is state."""

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
        return self.peak * self._factor(step + 1 if step < self.warmup_steps else step)  # the first step moves, too


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors called `<index>.<name>`, and numbers among it as `<index>.<type>:<name>`.

    Of its groups, `group<index>.<type>:<name>`, what it may have changed itself: Prodigy keeps its estimates there.

    Raises:
        ValueError: it keeps what is neither tensor nor number.
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
            f"optimizer {type(optimizer).__name__} keeps {name!r} as a {type(value).__name__}; checkpoints hold"
            " tensors and numbers."
        )
    kind = torch.float64 if type(value) is float else torch.int64
    return {f"{place}.{type(value).__name__}:{name}": torch.tensor(value, dtype=kind)}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
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

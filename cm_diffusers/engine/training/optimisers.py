"""Optimisers, the learning rate as a pure function of the step, and optimiser state as plain tensors."""

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from cm_diffusers.engine.config import RunArguments


def build_optimizer(network: nn.Module, run: RunArguments) -> torch.optim.Optimizer:
    """The optimiser that `run` names, over all parameters of `network`."""
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[run.optimizer]
    betas, decay = (run.adam_beta1, run.adam_beta2), run.adam_weight_decay
    settings = {"lr": run.learning_rate, "betas": betas, "eps": run.adam_epsilon, "weight_decay": decay}
    return cls(network.parameters(), **settings, foreach=True)  # fewer calls than one by one, on a CPU as well


class LearningRate:
    """diffusers' learning-rate schedules, called with the step: nothing of them is state."""

    def __init__(self, run: RunArguments):
        run = run.resolved(run.max_train_steps)
        self.peak, self.warmup_steps = run.learning_rate, run.lr_warmup_steps
        unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        warmup = {} if run.lr_scheduler == "constant" else {"num_warmup_steps": run.lr_warmup_steps}
        self._factor = get_scheduler(
            run.lr_scheduler, unused, num_training_steps=run.max_train_steps, **warmup
        ).lr_lambdas[0]

    def __call__(self, step: int) -> float:
        return self.peak * self._factor(step + 1 if step < self.warmup_steps else step)  # the first step moves, too


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors called `<index>.<name>`."""
    state = optimizer.state_dict()["state"]
    assert all(torch.is_tensor(value) for values in state.values() for value in values.values())
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

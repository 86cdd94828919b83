"""What is converted: the weights that were chosen from a checkpoint, and what its user and its file say of them."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cm_diffusers.convert.reading import Module, flatten, read_checkpoint


WEIGHTS = {"ema": ("ema",), "online": ("net", "model", "state_dict")}  # by their names in files that hold several


@dataclass(frozen=True)
class Options:
    """What a file may not tell. None stands for what is assumed then.

    Args:
        weights: "ema" or "online".
        family: a key of `FAMILIES` that the file has to be of.
        kind: "consistency" or "diffusion".
        num_head_channels: channels per attention head of ADM (64).
        image_size: side of the images (64; 28 and 32 for the small models).
        qkv_order: "new", or "legacy" for a network of guided diffusion's first code ("new").
        num_train_timesteps: levels of the grid of the training (40).
    """

    weights: str | None = None
    family: str | None = None
    kind: str | None = None
    num_head_channels: int | None = None
    image_size: int | None = None
    qkv_order: str | None = None
    num_train_timesteps: int | None = None


@dataclass
class ForeignCheckpoint:
    """The chosen weights of a checkpoint and what else it says of them."""

    path: Path
    tensors: dict[str, Tensor]
    module: Module | None
    loss: str
    options: Options
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=lambda: {"weights", "family"})  # the options that mattered

    def setting(self, name: str, default: float) -> float:
        """An attribute of the pickled network, or `default`, as an assumption, where only weights are known."""
        if self.module is None:
            self.notes.append(f"assumed: {name} {default}, which weights alone don't tell")
            return default
        value = self.module.state.get(name, default)
        if type(value) not in (int, float) or not value >= 0:
            raise ValueError(f"{self.path} has the setting {name} {value!r}, which must be a number of 0 or more.")
        return value

    def assumed(self, option: str, default: object, why: str = "which shapes don't tell") -> object:
        """What the user said, or else `default`, noted as an assumption."""
        self.used.add(option)
        value = getattr(self.options, option)
        if value is None:
            self.notes.append(f"assumed: --{option} {default}, {why}")
            return default
        return value


def read_source(path: Path, options: Options) -> ForeignCheckpoint:
    """The EMA or online weights that `path` holds.

    Raises:
        ValueError: it can't be read safely, or does not hold those that were asked for.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no weights but a {type(content).__name__}.")
    loss = content.get("loss_fn")
    found = {which: next((content[n] for n in names if n in content), None) for which, names in WEIGHTS.items()}
    found = {which: value for which, value in found.items() if isinstance(value, (dict, Module))}
    if not found:
        if options.weights is not None:
            raise ValueError(
                f"{path} holds one set of weights; its name says whether it is the EMA. Leave out"
                f" --{options.weights} and choose by the file."
            )
        value, note = content, "weights: the only ones in the file"
    else:
        which = options.weights or next(iter(found))
        if which not in found:
            raise ValueError(f"{path} holds no {which} weights, only {' and '.join(found)}.")
        value, note = found[which], f"weights: {which}"
    module = value if isinstance(value, Module) else None
    parts = flatten(module) if module else value
    tensors = {str(name).removeprefix("module."): part for name, part in parts.items() if isinstance(part, Tensor)}
    notes = [f"left out: {name}, which is no tensor" for name, part in parts.items() if not isinstance(part, Tensor)]
    loss = loss.kind if isinstance(loss, Module) else ""
    return ForeignCheckpoint(path, tensors, module, loss, options, [note, *notes])

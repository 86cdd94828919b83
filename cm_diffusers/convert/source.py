"""Input of a conversion: the chosen weights of a checkpoint, with the settings from the user and the file."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cm_diffusers.convert.reading import Module, flatten, read_checkpoint


WEIGHTS = {"ema": ("ema",), "online": ("net", "model", "state_dict")}  # names in files with several sets of weights


@dataclass(frozen=True)
class Options:
    """Settings that a file may lack. None stands for the default, which is then noted as an assumption.

    Args:
        weights: "ema" or "online" (default: EMA if the file has it).
        family: a key of `FAMILIES`; the conversion stops unless the file belongs to it.
        kind: "consistency" or "diffusion" (default: see the builder of the family).
        num_head_channels: channels per attention head of ADM (default 64).
        image_size: side of the images in pixels (default 64; 28 and 32 for the small models).
        qkv_order: "new" (default), or "legacy" for a network of guided diffusion's first code.
        num_train_timesteps: number of noise levels in the training's grid (default 40; 18 for CTM on CIFAR-10).
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
    """The chosen weights of a checkpoint, with the settings from the user and the file.

    Args:
        path: the checkpoint file.
        tensors: the weights (of any shape), by name.
        module: stand-in of the pickled network; None if the file holds weights alone.
        loss: class name of the pickled loss, or "".
        options: the user's settings.
        notes: choices, assumptions and omissions so far.
        used: names of the options that had an effect.
    """

    path: Path
    tensors: dict[str, Tensor]
    module: Module | None
    loss: str
    options: Options
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=lambda: {"weights", "family"})

    def setting(self, name: str, default: float) -> float:
        """The attribute `name` of the pickled network, else `default`.

        If the file holds weights alone, the default is noted as an assumption.

        Raises:
            ValueError: the attribute is not a number of 0 or more.
        """
        if self.module is None:
            self.notes.append(f"assumed: {name} {default}, because weights alone don't show it")
            return default
        value = self.module.state.get(name, default)
        if type(value) not in (int, float) or not value >= 0:
            raise ValueError(f"{self.path} has the setting {name} {value!r}, which must be a number of 0 or more.")
        return value

    def assumed(self, option: str, default: object, why: str = "because shapes don't show it") -> object:
        """The user's value of `option`, else `default`, noted as an assumption with the reason `why`."""
        self.used.add(option)
        value = getattr(self.options, option)
        if value is None:
            self.notes.append(f"assumed: --{option} {default}, {why}")
            return default
        return value


def read_source(path: Path, options: Options) -> ForeignCheckpoint:
    """Read the weights that `options` requests, EMA or online, from the file `path`.

    Raises:
        ValueError: the file can't be read safely, or does not hold the requested weights.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no weights but a {type(content).__name__}. Is it the right file?")
    loss = content.get("loss_fn")
    found = {which: next((content[n] for n in names if n in content), None) for which, names in WEIGHTS.items()}
    found = {which: value for which, value in found.items() if isinstance(value, (dict, Module))}
    if not found:
        if options.weights is not None:
            raise ValueError(
                f"{path} holds one set of weights, and only its name shows whether that is the EMA. Leave out"
                f" --{options.weights} and choose the file by its name."
            )
        value, note = content, "weights: the only set in the file"
    else:
        which = options.weights or next(iter(found))
        if which not in found:
            raise ValueError(
                f"{path} holds no {which} weights, only {' and '.join(found)}. Use --{next(iter(found))}."
            )
        value, note = found[which], f"weights: {which}"
    module = value if isinstance(value, Module) else None
    parts = flatten(module) if module else value
    tensors = {str(name).removeprefix("module."): part for name, part in parts.items() if isinstance(part, Tensor)}
    others = [name for name, part in parts.items() if not isinstance(part, Tensor)]
    notes = [f"left out: {name}, which is not a tensor" for name in others]
    loss = loss.kind if isinstance(loss, Module) else ""
    return ForeignCheckpoint(path, tensors, module, loss, options, [note, *notes])

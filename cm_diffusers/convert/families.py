"""Conversion of another project's checkpoint: its family is recognised by the names of tensors and classes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin

from cm_diffusers.convert import builders
from cm_diffusers.convert.source import ForeignCheckpoint, Options, read_source


FAMILIES = {
    "openai": "a consistency model (CD or CT) or EDM model of OpenAI's code: ADM, one time",
    "edm": "a diffusion model of EDM's code",
    "ect": "a consistency model of ECT's code",
    "cdm": "a consistent diffusion model of CDM's code",
    "ctm": "a consistency trajectory model of CTM's code: two times",
    "scm": "the sCM of MNIST or its diffusion model",
    "simo": "a consistency model of cloneofsimo's code",
}


@dataclass
class Converted:
    """A converted checkpoint.

    Args:
        family: a key of `FAMILIES`.
        result: a pipeline, or a network alone if no pipeline supports its preconditioning.
        notes: the choices, assumptions and omissions of the conversion.
        sampling: options of `training/sample.py` that sample it as its authors do.
    """

    family: str
    result: DiffusionPipeline | ModelMixin
    notes: list[str]
    sampling: str = ""


def convert_checkpoint(path: Path | str, options: Options = Options()) -> Converted:
    """Read the file `path` and convert it, without running any code in it.

    Args:
        path: a checkpoint file.
        options: settings that the file may lack, see `Options`.

    Raises:
        ValueError: one of these conditions:

            - the file can't be read safely;
            - its family is unknown, or not the requested one;
            - its tensors differ from those of its family;
            - an option is given that this family does not use or that the file determines.
    """
    source = read_source(Path(path), options)
    family, build = _recognise(source)
    if options.family not in (None, family):
        raise ValueError(_other_family(path, family, options.family))
    try:
        result, sampling = build(source)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path} looks like {FAMILIES[family]}, but its tensors have shapes that do not fit such a network"
            f" ({type(error).__name__}: {error}). Is the file complete?"
        ) from error
    unused = [name for name in vars(options) if getattr(options, name) is not None and name not in source.used]
    if unused:
        raise ValueError(
            f"--{unused[0]} does not apply to {FAMILIES[family]}, or the file determines it. Leave it out."
        )
    return Converted(family, result, source.notes, sampling)


def _recognise(source: ForeignCheckpoint) -> tuple[str, Callable[[ForeignCheckpoint], tuple]]:
    """Recognise the family by the names of tensors and classes; return it with its builder."""
    names = source.tensors.keys()
    if any(name.removeprefix("model.").startswith("enc.") for name in names):
        if any("map_layer0_s." in name for name in names):
            return "ctm", builders.ctm_of_edm
        if builders.precond_of(source) == "ECMPrecond":
            return "ect", builders.edm
        return ("cdm" if source.loss == "MartingaleLoss" else "edm"), builders.edm
    if "time_embed.0.weight" in names and "input_blocks.0.0.weight" in names:
        return ("ctm", builders.ctm) if "time_embed_s.0.weight" in names else ("openai", builders.openai)
    if "init_conv.conv.weight" in names and "logvar_linear.weight" in names:
        return "scm", builders.scm
    if "time_downs.0.weight" in names and "last.weight" in names:
        return "simo", builders.simo
    known = "; ".join(f"{name} ({what})" for name, what in FAMILIES.items())
    some = ", ".join(list(names)[:4]) or "no tensors at all"
    raise ValueError(f"{source.path} belongs to no known family: it holds {some}. Known are {known}.")


def _other_family(path: Path | str, found: str, asked: str) -> str:
    reason = ""
    if asked == "ctm" and found == "openai":
        reason = " It has no time_embed_s, hence no target time: CD and CT models are not CTM models."
    return f"{path} is not of the family {asked}. It is {FAMILIES[found]}: use --family {found}, or omit it.{reason}"

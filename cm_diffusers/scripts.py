"""The scripts and recipes of the top-level folder `training/`, importable as `cm_diffusers.scripts`.

They exist once: beside this package in the source tree, or inside it after installation from a wheel.
"""

from pathlib import Path


_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "scripts", _here.parent / "training") if folder.is_dir()][:1]

CONSOLE = "cm-diffusers"
WORDS = {  # the word of `cm-diffusers` for each script; all methods share one for training
    "train_consistency": "train",
    "train_continuous": "train",
    "train_trajectory": "train",
    "train_diffusion": "diffuse",
    "train_text_to_image": "text",
    "train_toy": "toy",
    "prepare_data": "prepare",
    **{name: name for name in ("convert", "diagnose", "edit", "evaluate", "export", "push", "report", "sample")},
}
CALLED_BY = "CM_DIFFUSERS_CALLED_BY"  # environment variable that the command sets for itself and its child processes
LAUNCHED_BY = "CM_DIFFUSERS_LAUNCHED_BY"  # the same, set if it starts several processes
SCRIPTS = Path(__path__[0])


def settings_files(folder: Path) -> dict[str, Path]:
    """The YAML files of `folder`, by their names without the suffix."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

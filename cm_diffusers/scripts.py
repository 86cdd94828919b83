"""The scripts of the top-level folder `training/`, with their recipes, as `cm_diffusers.scripts`, and their words.

They live in one place only: beside this package in the source tree, inside it once installed from a wheel.
"""

from pathlib import Path


_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "scripts", _here.parent / "training") if folder.is_dir()][:1]

CONSOLE = "cm-diffusers"
WORDS = {  # of the scripts; training has one for all methods
    "train_consistency": "train",
    "train_continuous": "train",
    "train_trajectory": "train",
    "train_diffusion": "diffuse",
    "train_toy": "toy",
    "prepare_data": "prepare",
    **{name: name for name in ("convert", "diagnose", "edit", "evaluate", "export", "push", "report", "sample")},
}
CALLED_BY = "CM_DIFFUSERS_CALLED_BY"  # of the environment: set by the command for itself and what it starts
LAUNCHED_BY = "CM_DIFFUSERS_LAUNCHED_BY"  # the same, where it starts several processes
SCRIPTS = Path(__path__[0])


def settings_files(folder: Path) -> dict[str, Path]:
    """The YAML files of a folder by their names."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

"""The scripts of the top-level folder `training/`, with their recipes, as `cm_diffusers.scripts`.

They live in one place only: beside this package in the source tree, inside it once installed from a wheel.
"""

from pathlib import Path


_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "scripts", _here.parent / "training") if folder.is_dir()][:1]

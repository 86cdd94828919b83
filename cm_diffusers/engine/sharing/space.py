"""The Space of a model: its demo with the needed files of this library, which is not on any package index."""

import shutil
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

import cm_diffusers
import cm_diffusers.pipelines
from cm_diffusers.engine.files import HUB_CARDS
from cm_diffusers.engine.sharing.card import licence_of


GRADIO = "6.31.0"  # as in constraints.txt
MODULES = (
    "__init__.py",
    "demo.py",
    "lookup.py",
    "parent.py",
    "pipelines.py",
    "pixels.py",
    "registration.py",
    "sampling.py",
)
LIBRARY = (*MODULES, "core/*.py", "models/*.py", "schedulers/*.py")
SPACE = ("README.md", "app.py", "requirements.txt", "pipelines/*.py", *(f"cm_diffusers/{part}" for part in LIBRARY))


def write_space(folder: Path, model: str, model_dir: Path) -> None:
    """Write all files of a model's Space to `folder`.

    Args:
        folder: an empty folder.
        model: Hub id of the model.
        model_dir: local folder of the model. The licence of its card is copied.
    """
    for source, target, patterns in (
        (Path(cm_diffusers.__file__).parent, folder / "cm_diffusers", LIBRARY),
        (Path(cm_diffusers.pipelines.__path__[0]), folder / "pipelines", ("*.py",)),
        (HUB_CARDS / "space", folder, ("requirements.txt",)),
    ):
        for file in (file for pattern in patterns for file in source.glob(pattern)):
            path = target / file.relative_to(source)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, path)
    (folder / "app.py").write_text((HUB_CARDS / "space" / "app.py").read_text().replace("MODEL", model))
    title = model.split("/")[-1]
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=GRADIO,
        python_version="3.11",
        app_file="app.py",
        models=[model],
        license=licence_of(str(model_dir)),
    )
    template = str(HUB_CARDS / "space" / "README.md")
    SpaceCard.from_template(data, template_path=template, title=title, model=model).save(folder / "README.md")

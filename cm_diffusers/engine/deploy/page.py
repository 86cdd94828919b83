"""A static page that samples in the browser with exported ONNX graphs."""

import shutil
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from cm_diffusers.engine.files import HUB_CARDS
from cm_diffusers.engine.sharing.card import licence_of


RUNTIME_VERSION = "1.30.0"  # of the npm package onnxruntime-web
RUNTIME_URL = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{RUNTIME_VERSION}/dist/"
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
PAGE = ("index.html", "app.js")


def write_page(folder: Path, model: str, model_dir: str, runtime: Path | None = None) -> None:
    """Write a page to a folder with exported samplers; the folder is then also a static Space.

    Args:
        folder: the folder with the samplers and `sampler.json`.
        model: the name of the model on the page: its Hub id if it has one.
        model_dir: the folder or Hub id of the model; the Space's card takes the licence from the model's card.
        runtime: the folder `dist` of onnxruntime-web, from which the needed files are copied. Without it the page
            loads them from a content delivery network.

    Raises:
        ValueError: `runtime` lacks a file.
    """
    if runtime is not None:
        lacking = [name for name in RUNTIME_FILES if not (runtime / name).is_file()]
        if lacking:
            raise ValueError(
                f"runtime_dir {str(runtime)!r} lacks {', '.join(lacking)}. Give the folder dist of the npm package"
                " onnxruntime-web."
            )
        (folder / "runtime").mkdir(exist_ok=True)
        for name in RUNTIME_FILES:
            shutil.copyfile(runtime / name, folder / "runtime" / name)
    place = RUNTIME_URL if runtime is None else "runtime/"
    for name in PAGE:
        text = (HUB_CARDS / "page" / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace('"RUNTIME"', f'"{place}"'), encoding="utf-8")
    title = model.split("/")[-1]
    data = SpaceCardData(
        title=title, sdk="static", app_file="index.html", models=[model], license=licence_of(model_dir)
    )
    template = str(HUB_CARDS / "page" / "README.md")
    SpaceCard.from_template(data, template_path=template, title=title, model=model).save(folder / "README.md")

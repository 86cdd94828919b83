"""The recipes that `--config` takes by name: their list, and summaries of each."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from cm_diffusers.models import build_unet
from cm_diffusers.scripts import SCRIPTS, settings_files


# side and channels of the images of the recipes' datasets; a recipe's `resolution` wins
SHAPES = {"digits": (8, 1), "ylecun/mnist": (28, 1), "uoft-cs/cifar10": (32, 3)}


TIME = re.compile(r"(less than )?(a few|some|\w+) minutes( on [^,.:;]*)?")  # how recipes state a measured duration


def about(path: Path) -> dict[str, str]:
    """Summarise a recipe: its method, data, network, length, duration and the first sentence of its comment.

    Args:
        path: the YAML file of the recipe.
    """
    text = path.read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    said = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    steps, batch = settings["max_train_steps"], settings.get("train_batch_size", 1)
    return {
        "method": settings["method"],
        "data": settings.get("dataset_name", ""),
        "network": _network(settings),
        "length": f"{steps:,} steps of {batch}",
        "time": found[0] if (found := TIME.search(said)) else "time not measured",
        "about": re.split(r"(?<=\.) (?=[A-Z])", said)[0],
    }


def _network(settings: dict) -> str:
    """The preset with its number of parameters, or the model that the recipe starts from."""
    preset = settings.get("model_preset")
    if preset is None:
        start = settings.get("pretrained_model_name_or_path") or settings.get("pretrained_teacher_model")
        return f"from {start}" if start else "small"
    side, channels = SHAPES.get(settings.get("dataset_name", ""), (64, 3))
    side = settings.get("resolution", side)
    with torch.device("meta"):
        network = build_unet(preset, (side, side), channels, 10 if settings.get("class_conditional") else None)
    return f"{preset}, {sum(p.numel() for p in network.parameters()) / 1e6:.3g} M at {side} x {side}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the list of recipes, or one recipe as YAML. An unknown name ends the program with code 2."""
    parser = argparse.ArgumentParser(
        prog="cm-diffusers recipes",
        description="List the recipes that --config takes by name, with data, network, length and duration. With a"
        " name, print that recipe as YAML.",
    )
    parser.add_argument("name", nargs="?", help="Name of the recipe to print. Default: list all recipes.")
    name, known = parser.parse_args(argv).name, settings_files(SCRIPTS / "configs")
    if name is not None:
        if name not in known:
            parser.error(f"{name!r} is not a recipe. The recipes are: {', '.join(known)}.")
        print(known[name].read_text(encoding="utf-8"), end="")
        return
    for recipe, path in known.items():
        found = about(path)
        length = f"{found['length']}, {found['time']}"
        print(f"{recipe}: {found['method']} on {found['data']}, {length}, network {found['network']}")
        print(f"    {found['about']}")
    print("\nTrain one: cm-diffusers train --config NAME (for diffusion and cdm: cm-diffusers diffuse --config NAME).")

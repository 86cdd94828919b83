"""The recipes that `--config` knows by name, and what they come to."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from cm_diffusers.models import build_unet
from cm_diffusers.scripts import SCRIPTS, settings_files


# height, width and channels of the datasets that recipes name, unless they say a resolution
SHAPES = {"digits": (8, 1), "ylecun/mnist": (28, 1), "uoft-cs/cifar10": (32, 3)}


TIME = re.compile(r"(less than )?(a few|some|\w+) minutes( on [^,.:;]*)?")  # as the files say what was measured


def about(path: Path) -> dict[str, str]:
    """What a recipe comes to: its method, data, network, length, and what its file says of it first."""
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
    """The preset with its number of parameters, or the model that the recipe begins with."""
    preset = settings.get("model_preset")
    if preset is None:
        start = settings.get("pretrained_model_name_or_path") or settings.get("pretrained_teacher_model")
        return f"that of {start}" if start else "small"
    side, channels = SHAPES.get(settings.get("dataset_name", ""), (64, 3))
    side = settings.get("resolution", side)
    with torch.device("meta"):
        network = build_unet(preset, (side, side), channels, 10 if settings.get("class_conditional") else None)
    return f"{preset}, {sum(p.numel() for p in network.parameters()) / 1e6:.3g} M at {side} x {side}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="cm-diffusers recipes", description="List the recipes that --config knows by name, or print one."
    )
    parser.add_argument("name", nargs="?", help="the recipe to print")
    name, known = parser.parse_args(argv).name, settings_files(SCRIPTS / "configs")
    if name is not None:
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}.")
        print(known[name].read_text(encoding="utf-8"), end="")
        return
    for recipe, path in known.items():
        found = about(path)
        length = f"{found['length']}, {found['time']}"
        print(f"{recipe}: {found['method']} on {found['data']}, {length}, network {found['network']}")
        print(f"    {found['about']}")
    print("\nTrain one: cm-diffusers train --config NAME (diffusion and cdm: cm-diffusers diffuse --config NAME).")

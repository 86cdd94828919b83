"""The model card: what a saved model is, how it was made, how to use it. All of it comes from the run itself."""

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import cm_diffusers
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.pictures import image_grid
from cm_diffusers.engine.preview import sample_images, with_our_interface
from cm_diffusers.objectives import Objective


_here = Path(cm_diffusers.__file__).parent
TEMPLATE = next(f for f in (_here / "hub_cards", _here.parent / "hub_cards") if f.is_dir()) / "model_card.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PLACES = {"output_dir", "train_data_dir", "config", "revision"}
NAMES = (
    "dataset_name",
    "pretrained_teacher_model",
    "pretrained_model_name_or_path",
    "model_config_name_or_path",
    "vae_name_or_path",
)


@dataclass(frozen=True)
class Surroundings:
    """What a run knows beside its settings.

    Args:
        steps: optimiser steps taken.
        images_per_step: on all processes together.
        processes: how many there were.
        shape: of the images, for example "1 x 16 x 16, 10 classes".
    """

    steps: int
    images_per_step: int
    processes: int
    shape: str


def hub_id(name: str | None) -> str | None:
    """`name` where it can be a Hub id and not a folder of this machine, whose name is nobody's business."""
    return name if name and HUB_ID.fullmatch(name) and not Path(name).exists() else None


def shown(name: str | None, otherwise: str) -> str:
    """A link to the Hub, or words in place of a local path."""
    known = hub_id(name)
    return f"[{known}](https://huggingface.co/{known})" if known else otherwise


def commit() -> str:
    """The library's version, and its commit where it runs from a checkout."""
    command = ["git", "-C", str(_here), "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return f"cm_diffusers {cm_diffusers.__version__}" + (
        f", commit {found.stdout.strip()}" if not found.returncode else ""
    )


@cache  # a teacher on the Hub is asked once, and not at each save
def licence_of(teacher: str | None) -> str | None:
    """The licence that a teacher's own card states; None where there is no card or it says nothing."""
    if teacher is None:
        return None
    try:
        return ModelCard.load(Path(teacher) / "README.md" if Path(teacher).exists() else teacher).data.license
    except Exception:  # no card, no network, a card that can't be read: nothing is known
        return None


def read_metrics(file: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers of a report or metrics file beside a model, by name, and how they were taken."""
    if not file.is_file():
        return {}, {}
    report = json.loads(file.read_text())
    numbers = {
        f"{group.replace('_', ' ')}, {name.replace('_', ' ')}": value
        for group, values in report.items()
        if isinstance(values, dict) and group not in ("time", "steps")
        for name, value in values.items()
        if isinstance(value, (int, float))
    }
    notes = {name: str(report[name]) for name in ("dataset", "features", "num_samples") if name in report}
    return numbers, notes


def snippet(pipeline: DiffusionPipeline, repo: str, trusting: bool = False) -> str:
    """Python that loads the model and makes images."""
    stock = type(pipeline).__module__.startswith("diffusers.")
    lines = [] if stock or trusting else ["import cm_diffusers  # so that diffusers knows its classes"]
    extra = ', custom_pipeline="pipeline", trust_remote_code=True' if trusting else ""
    lines += [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{repo}"{extra})',
    ]
    classes = pipeline.unet.config.num_class_embeds
    labels = f"class_labels={[i % classes for i in range(4)]}, " if classes else ""
    steps = 18 if "Denoising" in type(pipeline).__name__ or pipeline.scheduler.config.get("solver") == "heun" else 2
    lines.append(f"images = pipe(batch_size=4, {labels}num_inference_steps={steps}).images")
    return "\n".join(lines)


def recipe(config: Config) -> str:
    """The settings as YAML, without places and names of this machine."""
    kept = {key: value for key, value in config.to_dict().items() if key not in PLACES and value is not None}
    for name in NAMES:
        if name in kept and hub_id(kept[name]) is None:
            kept.pop(name)
    return yaml.safe_dump(kept, sort_keys=False).strip()


def model_card(
    config: Config,
    objective: Objective,
    pipeline: DiffusionPipeline,
    around: Surroundings,
    repo: str,
    grids: Mapping[str, str],
    metrics: Path,
) -> ModelCard:
    """The card of `pipeline`, to be saved as its README.md.

    Args:
        config: the run's settings.
        objective: its method.
        pipeline: what was trained.
        around: what else the run knows.
        repo: how the card calls the model: its Hub id, or a folder's name.
        grids: titles and files of pictures in the model's folder.
        metrics: a JSON file of measured numbers, which may be absent.

    Raises:
        ValueError: the card's front matter is not what the Hub reads.
    """
    stock = type(pipeline).__module__.startswith("diffusers.")
    teacher = getattr(config.options, "pretrained_teacher_model", None)
    licence = licence_of(teacher)
    numbers, notes = read_metrics(metrics)
    data = config.data
    results = [
        EvalResult("unconditional-image-generation", "image", notes.get("dataset", "the training data"), name, value)
        for name, value in numbers.items()
    ]
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["cm_diffusers", "consistency-models", config.method],
        datasets=hub_id(data.dataset_name),
        base_model=hub_id(teacher or config.model.pretrained_model_name_or_path),
        license=licence,
        model_name=repo.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    count, device = around.processes, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    warning = None
    if licence and re.search(r"(^|-)nc(-|$)|non-?commercial", licence.lower()):
        warning = f"Its teacher's licence, {licence}, does not allow commercial use, and this model comes from it."
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=repo.split("/")[-1],
        what=f"A generator of images ({around.shape}).",
        method=config.method,
        facts=objective.facts,
        grids=grids,
        stock=stock,
        snippet=snippet(pipeline, repo),
        trusting_snippet=snippet(pipeline, repo, trusting=True),
        sampling=_sampling(pipeline),
        dataset=shown(data.dataset_name, data.dataset_name if data.dataset_name == "digits" else "a local dataset"),
        shape=around.shape,
        sigma_data=objective.spec.sigma_data,
        network=type(pipeline.unet).__name__,
        parameters=sum(p.numel() for p in pipeline.unet.parameters()),
        teacher=shown(teacher, "a local model" if teacher else "none") + (f", licence {licence}" if licence else ""),
        steps=around.steps,
        images_per_step=around.images_per_step,
        seed=config.run.seed,
        hardware=f"{count} process{'es' if count > 1 else ''}, {device}",
        library=commit(),
        recipe=recipe(config),
        metrics=numbers,
        notes=notes,
        warning=warning,
    )
    if yaml.safe_load(str(card).split("---")[1]) != card.data.to_dict():
        raise ValueError("the model card's front matter can't be read back; this is a fault of the library.")
    return card


def draw_grids(pipeline: DiffusionPipeline, folder: Path) -> dict[str, str]:
    """Pictures of samples by each of the usual numbers of steps, in `folder`/samples; their files by title."""
    ours = with_our_interface(pipeline)
    ours.set_progress_bar_config(disable=True)
    steps = (*ours.default_steps, 4) if 1 in ours.default_steps else ours.default_steps
    (folder / "samples").mkdir()
    files = {}
    for n in steps:
        images, name = sample_images(ours, range(40), num_inference_steps=n), f"{n} step{'s' if n > 1 else ''}"
        if images.shape[-1] in (1, 3):  # latents have no picture
            files[name] = f"samples/{name.replace(' ', '_')}.png"
            image_grid(images, 10).save(folder / files[name])
    return files


def _sampling(pipeline: DiffusionPipeline) -> str:
    """How to ask for more or fewer network calls."""
    config = pipeline.scheduler.config
    top = f"{config.get('sigma_max', 80):g}"
    if config.get("gamma_rule"):
        return f"`num_inference_steps=n, gamma=g`: n jumps from sigma {top}; gamma is the share of noise drawn anew."
    return f"`num_inference_steps=n`: n network calls or more, from noise of sigma {top}."

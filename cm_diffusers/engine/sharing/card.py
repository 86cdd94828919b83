"""The model card: what a saved model is, how it was made, how to use it. All of it comes from the run itself."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

import cm_diffusers
from cm_diffusers.engine.commands import command
from cm_diffusers.engine.config import Config
from cm_diffusers.engine.data.description import DataDescription
from cm_diffusers.engine.files import HUB_CARDS, LIBRARY, RunFiles, read_json, replace_file, why
from cm_diffusers.engine.shareable import ON_THIS_MACHINE, hub_id, portable
from cm_diffusers.objectives import Objective
from cm_diffusers.objectives.options import flags_of, phases
from cm_diffusers.sampling import (
    captions_of,
    image_grid,
    labels_in_turn,
    levels_used,
    sample_images,
    with_our_interface,
)


TEMPLATE = HUB_CARDS / "model_card.md"
HALF = {"fp16": "float16", "bf16": "bfloat16"}
MOST_NAMES = 100  # of classes in a card
NO_METRICS = ("name", "step", "num_inference_steps", "sigmas", "how")  # what a result in it has that is no metric


@dataclass(frozen=True)
class RunSummary:
    """What a run knows beside its settings.

    Args:
        steps: optimiser steps taken.
        images_per_step: on all processes together.
        processes: how many there were.
        shape: of the images, for example "1 x 16 x 16, 10 classes".
        data: what the dataset is.
    """

    steps: int
    images_per_step: int
    processes: int
    shape: str
    data: DataDescription


def shown(name: str | None, revision: str | None, otherwise: str) -> str:
    """A link to the Hub, or words in place of a local path."""
    known = hub_id(name)
    at = f", revision {revision}" if revision else ""
    return f"[{known}](https://huggingface.co/{known}){at}" if known else otherwise


def commit() -> str:
    """The library's version, and its commit where it runs from a checkout."""
    command = ["git", "-C", str(LIBRARY), "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return f"cm_diffusers {cm_diffusers.__version__}" + (
        f", commit {found.stdout.strip()}" if not found.returncode else ""
    )


@cache  # a teacher on the Hub is asked once, and not at each save
def licence_of(teacher: str | None, revision: str | None = None) -> str | None:
    """The licence that a teacher's own card states; None where there is no card or it says nothing."""
    if teacher is None:
        return None
    try:
        if Path(teacher).exists():
            return ModelCard.load(Path(teacher) / "README.md").data.license
        return ModelCard(Path(hf_hub_download(teacher, "README.md", revision=revision)).read_text()).data.license
    except Exception:  # no card, no network, a card that can't be read: nothing is known
        return None


def read_facts(file: Path) -> dict[str, Any]:
    """A card.json. Raises OSError, or ValueError whose message goes on after the file's name."""
    facts = read_json(file)
    if not isinstance(facts, dict):
        raise ValueError(f"holds {facts!r:.40} where names and values belong")
    return facts


def read_report(file: Path) -> dict[str, Any]:
    """What is measured in a metrics.json. Raises OSError, or ValueError that goes on after the file's name."""
    report = read_facts(file)
    results = report.get("results")
    if not isinstance(results, list) or not results or not all(map(_is_result, results)):
        raise ValueError("holds no results, or others than are measured here")
    return report


def _is_result(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and type(row.get("step", 0)) is int
        and all(isinstance(value, (int, float)) for key, value in row.items() if key not in NO_METRICS)
    )


def read_metrics(file: Path) -> tuple[dict[str, float], dict[str, str]]:
    """The numbers of a metrics.json by name, those of its last step of training, and how they were taken.

    Raises OSError, or ValueError whose message goes on after the file's name.
    """
    if not os.path.lexists(file):
        return {}, {}
    report = read_report(file)
    extractor = report.get("extractor")
    if not isinstance(extractor, dict) or not isinstance(extractor.get("name"), str):
        raise ValueError("does not say which features were measured")
    last = max(row.get("step", 0) for row in report["results"])
    numbers = {
        f"{key.replace('_', ' ')}, {row['name']}": float(f"{value:.5g}")
        for row in report["results"]
        if row.get("step", 0) == last
        for key, value in row.items()
        if key not in NO_METRICS
    }
    notes = {key: str(report[key]) for key in ("dataset", "split", "num_samples") if key in report}
    if isinstance(real := report.get("real_images"), dict) and "frechet_distance" in real:
        notes["real images against others"] = f"frechet distance {real['frechet_distance']:.5g}"
    notes["features"] = extractor["name"] + ("" if any("fid" in row for row in report["results"]) else " (not FID)")
    return numbers, notes | ({"step": str(last)} if last else {})


def snippet(facts: Mapping[str, Any], repo: str, trusting: bool = False, variant: str | None = None) -> str:
    """Python that loads the model, or its weights in the precision of a `variant`, and makes images.

    Models of stock classes need nothing but diffusers, except in bfloat16, of which its pipeline makes no pictures.
    """
    module, cls, lines = "diffusers", "DiffusionPipeline", []
    extra = ', custom_pipeline="pipeline", trust_remote_code=True' if trusting else ""
    if variant is not None:
        lines.append("import torch")
        extra = f', variant="{variant}", dtype=torch.{HALF[variant]}'
    if facts["stock"] and variant == "bf16":
        module, cls = "cm_diffusers", "ConsistencyPipeline"
    elif not facts["stock"] and not trusting:
        lines.append("import cm_diffusers  # so that diffusers knows its classes")
    lines += [f"from {module} import {cls}", "", f'pipe = {cls}.from_pretrained("{repo}"{extra})']
    labels = f"class_labels={_four_labels(facts)}, " if facts["classes"] else ""
    lines.append(f"images = pipe(batch_size=4, {labels}num_inference_steps={facts['usual_steps']}).images")
    return "\n".join(lines)


def _four_labels(facts: Mapping[str, Any]) -> str:
    """Python of four labels that have images: names, where the pipeline takes them and they say more than numbers."""
    names = facts.get("names") or {str(label): str(label) for label in range(facts["classes"])}
    known = list(names.items())
    four = [known[i % len(known)] for i in range(4)]
    unique = len(set(names.values())) == len(names)
    if facts["stock"] or not unique or all(label == name for label, name in four):
        return str([int(label) for label, _ in four])
    return json.dumps([name for _, name in four], ensure_ascii=False)


def _listed_names(data: DataDescription) -> str | None:
    """The classes for a cell of the card's table; None where they have no names of their own."""
    if not data.classes or all(str(label) == name for label, name in data.classes.items()):
        return None
    cells = [f"{label} {' '.join(name.split()).replace('|', '/')}" for label, name in data.classes.items()]
    return ", ".join(cells[:MOST_NAMES]) + (", ... (all are in data.json)" if len(cells) > MOST_NAMES else "")


def portable_settings(config: Config) -> dict[str, Any]:
    """The settings, with `ON_THIS_MACHINE` in place of the names of folders of this machine."""
    return config.to_dict() | {
        name: ON_THIS_MACHINE
        for part in config.parts
        for name, flag in flags_of(part).items()
        if flag.place is not None and portable(flag, getattr(part, name)) is None and getattr(part, name) is not None
    }


def card_facts(
    config: Config,
    objective: Objective,
    pipeline: DiffusionPipeline,
    run: RunSummary,
    grids: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """What the card of `pipeline` says, as JSON: all but its name and what was measured of it.

    Args:
        config: the run's settings.
        objective: its method.
        pipeline: what was trained.
        run: what else the run knows.
        grids: by title the pictures in the model's folder ("file") and the noise levels that they took ("sigmas").
    """
    data, settings, flags = config.data, portable_settings(config), config.flags()
    teacher, revision = config.options.teacher, config.model.teacher_revision
    licence = licence_of(teacher, revision)
    count, device = run.processes, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    local_data = "the handwritten digits of scikit-learn" if data.dataset_name == "digits" else "a local dataset"
    start = config.model.pretrained_model_name_or_path
    known = [hub_id(name) for name in (data.dataset_name, *(data.extra_datasets or []))]
    others = [shown(name, None, "a local dataset") for name in data.extra_datasets or []]
    return {
        "method": config.method,
        "what": objective.summary.what,
        "paper": objective.summary.paper,
        "shape": run.shape,
        "stock": type(pipeline).__module__.startswith("diffusers."),
        "variant": config.run.export_variant,
        "classes": pipeline.unet.config.num_class_embeds,
        "names": run.data.to_dict()["classes"],
        "listed_names": _listed_names(run.data),
        "number": run.data.number,
        "empty_classes": run.data.empty_classes,
        "usual_steps": max(with_our_interface(pipeline).default_steps),
        "sigma_max": pipeline.scheduler.config.get("sigma_max", 80.0),
        "gamma": pipeline.scheduler.config.get("gamma_rule") is not None,
        "grids": grids,
        "dataset": " and ".join([shown(data.dataset_name, data.dataset_revision, local_data), *others]),
        "datasets": list(filter(None, known)) if others else known[0],
        "sigma_data": objective.spec.sigma_data,
        "network": type(pipeline.unet).__name__,
        "parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        "weights": "an average of the weights" if config.run.export_weights == "ema" else "the weights themselves",
        "teacher": shown(teacher, revision, "a local model" if teacher else "none"),
        "base_model": hub_id(teacher or start),
        "licence": licence,
        "warning": _warning(licence),
        "steps": run.steps,
        "phases": phases(objective.options, run.steps),
        "images_per_step": run.images_per_step,
        "seed": config.run.seed,
        "hardware": f"{count} process{'es' if count > 1 else ''}, {device}",
        "library": commit(),
        "recipe": {
            key: value
            for key, value in settings.items()
            if value not in (None, ON_THIS_MACHINE) and (key == "method" or flags[key].in_recipe)
        },
    }


def _warning(licence: str | None) -> str | None:
    if licence and re.search(r"(^|-)nc(-|$)|non-?commercial", licence.lower()):
        return f"Its teacher's licence, {licence}, does not allow commercial use, and this model comes from it."
    return None


def model_card(facts: Mapping[str, Any], repo: str, metrics: Path) -> ModelCard:
    """The card of a model, to be saved as its README.md.

    Args:
        facts: from `card_facts`.
        repo: how the card calls the model: its Hub id, or a folder's name.
        metrics: a JSON file of measured numbers, which may be absent.

    Raises:
        ValueError: the metrics are damaged, or the card's front matter is not what the Hub reads.
    """
    try:
        numbers, notes = read_metrics(metrics)
    except (OSError, ValueError) as error:
        raise ValueError(f"{metrics} {why(error)}. Move it away, or measure again by {command('evaluate')}.") from None
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type="image",
            dataset_name=notes.get("dataset", "the training data"),
            metric_type=name.split(",")[0].replace(" ", "_"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in numbers.items()
    ]
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["cm_diffusers", "consistency-models", facts["method"]],
        datasets=facts["datasets"],
        base_model=facts["base_model"],
        license=facts["licence"],
        model_name=repo.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=repo.split("/")[-1],
        snippet=snippet(facts, repo),
        half_snippet=snippet(facts, repo, variant=facts["variant"]) if facts.get("variant") else None,
        trusting_snippet=snippet(facts, repo, trusting=True),
        metrics=numbers,
        notes=notes,
        version=cm_diffusers.__version__,
        **{**facts, "recipe": yaml.safe_dump(facts["recipe"], sort_keys=False).strip()},
    )
    if yaml.safe_load(str(card).split("---")[1]) != card.data.to_dict():
        raise ValueError("the model card's front matter can't be read back; this is a fault of the library.")
    return card


def renew_card(model: Path, repo: str) -> None:
    """Write the card of a run's saved `model` again, under the name `repo` and with what was measured since.

    The run's facts and its report lie beside the model's folder; a model without facts keeps the card that it has.
    Raises ValueError where they are damaged.
    """
    file = model.parent / RunFiles.FACTS
    if os.path.lexists(file):
        try:
            card = model_card(read_facts(file), repo, model.parent / RunFiles.METRICS)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            if RunFiles.METRICS in str(error):
                raise
            raise ValueError(f"{file} {why(error)}. Move it away, and the model keeps the card that it has.") from None
        replace_file(model / "README.md", str(card))


def draw_grids(pipeline: DiffusionPipeline, folder: Path) -> dict[str, dict[str, str]]:
    """Pictures of samples by each of the usual numbers of steps, in `folder`/samples.

    Gives by title their files and the noise levels that they started from, see `card_facts`.
    """
    ours = with_our_interface(pipeline)
    ours.set_progress_bar_config(disable=True)
    steps = (*ours.default_steps, 4) if 1 in ours.default_steps else ours.default_steps
    (folder / "samples").mkdir()
    grids, seeds = {}, range(40)
    captions = captions_of(ours, labels_in_turn(ours, seeds))
    for n in steps:
        images, name = sample_images(ours, seeds, num_inference_steps=n), f"{n} step{'s' if n > 1 else ''}"
        if images.shape[-1] in (1, 3):  # latents have no picture
            file = f"samples/{name.replace(' ', '_')}.png"
            image_grid(images, 10, captions=captions).save(folder / file)
            grids[name] = {"file": file, "sigmas": ", ".join(f"{s:.4g}" for s in levels_used(ours))}
    return grids

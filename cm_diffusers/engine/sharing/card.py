"""The model card, which describes a saved model, its training and its use. All facts come from the run."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
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
MOST_NAMES = 100  # names of classes in a card
NO_METRICS = ("name", "step", "num_inference_steps", "sigmas", "how")  # entries of a result that are not metrics


@dataclass(frozen=True)
class RunSummary:
    """The facts of a run that its settings lack.

    Args:
        steps: number of training steps.
        images_per_step: images per training step on all processes together.
        processes: number of processes.
        shape: shape and classes of the images, for example "1 x 16 x 16, 10 classes".
        data: description of the dataset.
    """

    steps: int
    images_per_step: int
    processes: int
    shape: str
    data: DataDescription


def shown(name: str | None, revision: str | None, otherwise: str) -> str:
    """Return a Markdown link to a Hub repository, or replacement words for a local path.

    Args:
        name: a Hub id, a local path, or None.
        revision: branch, tag or commit on the Hub.
        otherwise: the replacement words.
    """
    known = hub_id(name)
    at = f", revision {revision}" if revision else ""
    return f"[{known}](https://huggingface.co/{known}){at}" if known else otherwise


def commit() -> str:
    """Return the version of the library, with the commit if it runs from a git checkout."""
    command = ["git", "-C", str(LIBRARY), "rev-parse", "--short=12", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return f"cm_diffusers {cm_diffusers.__version__}" + (
        f", commit {found.stdout.strip()}" if not found.returncode else ""
    )


@cache  # the Hub is asked once per teacher, not at each save
def licence_of(teacher: str | None, revision: str | None = None) -> str | None:
    """Return the licence in the card of `teacher`; None if no card or licence can be read.

    Args:
        teacher: a folder or a Hub id; None for no teacher.
        revision: branch, tag or commit on the Hub.
    """
    if teacher is None:
        return None
    try:
        if Path(teacher).exists():
            return ModelCard.load(Path(teacher) / "README.md").data.license
        return ModelCard(Path(hf_hub_download(teacher, "README.md", revision=revision)).read_text()).data.license
    except Exception:  # without a readable card the licence is unknown
        return None


def read_facts(file: Path) -> dict[str, Any]:
    """Read a card.json.

    Raises:
        OSError: the file is unreadable.
        ValueError: the content is not a JSON object. The message continues a sentence that begins with the file name.
    """
    facts = read_json(file)
    if not isinstance(facts, dict):
        raise ValueError(f"must hold a JSON object, but holds {facts!r:.40}")
    return facts


def read_report(file: Path) -> dict[str, Any]:
    """Read a metrics.json with its results.

    Raises:
        OSError: the file is unreadable.
        ValueError: results are missing or malformed. The message continues a sentence that begins with the file name.
    """
    report = read_facts(file)
    results = report.get("results")
    if not isinstance(results, list) or not results or not all(map(_is_result, results)):
        raise ValueError("has no results, or results that evaluate.py did not write")
    return report


def _is_result(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and type(row.get("step", 0)) is int
        and all(isinstance(value, (int, float)) for key, value in row.items() if key not in NO_METRICS)
    )


def read_metrics(file: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Read the metrics of a metrics.json at its last training step.

    Returns:
        Numbers by name, such as "frechet distance, 1 step", and notes on how they were measured. Both are empty if the
        file does not exist.

    Raises:
        OSError: the file is unreadable.
        ValueError: the content is malformed. The message continues a sentence that begins with the file name.
    """
    if not os.path.lexists(file):
        return {}, {}
    report = read_report(file)
    extractor = report.get("extractor")
    if not isinstance(extractor, dict) or not isinstance(extractor.get("name"), str):
        raise ValueError("does not name the extractor of its features")
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
    """Return Python code that loads the model and generates four images.

    Models of stock classes need only diffusers, except in bfloat16, in which its pipeline can't sample.

    Args:
        facts: from `card_facts`.
        repo: Hub id or folder of the model.
        trusting: load without this library, by running the code in the repository.
        variant: "fp16" or "bf16" for the weights in this precision; None for float32.
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
    """Python code of four labels with images; names if the pipeline accepts them and they are more than numbers."""
    names = facts.get("names") or {str(label): str(label) for label in range(facts["classes"])}
    known = list(names.items())
    four = [known[i % len(known)] for i in range(4)]
    unique = len(set(names.values())) == len(names)
    if facts["stock"] or not unique or all(label == name for label, name in four):
        return str([int(label) for label, _ in four])
    return json.dumps([name for _, name in four], ensure_ascii=False)


def _listed_names(data: DataDescription) -> str | None:
    """The classes for a cell of the card's table; None if their names are only their numbers."""
    if not data.classes or all(str(label) == name for label, name in data.classes.items()):
        return None
    cells = [f"{label} {' '.join(name.split()).replace('|', '/')}" for label, name in data.classes.items()]
    return ", ".join(cells[:MOST_NAMES]) + (", ... (all are in data.json)" if len(cells) > MOST_NAMES else "")


def portable_settings(config: Config) -> dict[str, Any]:
    """Return the settings of a run, with `ON_THIS_MACHINE` in place of local paths."""
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
    """Return the facts for the card of `pipeline` as JSON values, without its name and metrics.

    Args:
        config: the settings of the run.
        objective: the method.
        pipeline: the trained pipeline.
        run: further facts of the run.
        grids: by title, a picture in the model's folder ("file") and the noise levels of its sampling ("sigmas").
    """
    data, settings, flags = config.data, portable_settings(config), config.flags()
    teacher, revision = config.options.teacher, config.model.teacher_revision
    licence = licence_of(teacher, revision)
    count, device = run.processes, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    local_data = "scikit-learn's handwritten digits" if data.dataset_name == "digits" else "a local dataset"
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
        "weights": "EMA weights" if config.run.export_weights == "ema" else "weights without EMA",
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
        return f"The teacher's licence ({licence}) does not allow commercial use. This model derives from the teacher."
    return None


def model_card(facts: Mapping[str, Any], repo: str, metrics: Path) -> ModelCard:
    """Make the card of a model, which is saved as its README.md.

    Args:
        facts: from `card_facts`.
        repo: the name of the model in the card: its Hub id, or the name of its folder.
        metrics: path of metrics.json, which can be missing.

    Raises:
        ValueError: the metrics are damaged, or the front matter of the card can't be read back.
    """
    try:
        numbers, notes = read_metrics(metrics)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{metrics} {why(error)}. Move it away, or measure again with {command('evaluate')}."
        ) from None
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
        raise ValueError(
            "the front matter of the model card can't be read back. This is a bug of cm_diffusers; please report it."
        )
    return card


def renew_card(model: Path, repo: str, make: Callable[[Mapping[str, Any], str, Path], ModelCard] = model_card) -> None:
    """Write the card of a run's saved model again, with a new name and the newest metrics.

    card.json and metrics.json are read beside the model's folder. Without card.json, the card is left unchanged.

    Args:
        model: folder of the saved model.
        repo: the new name: a Hub id, or the name of a folder.
        make: makes the card from its facts, its name and the path of metrics.json.

    Raises:
        ValueError: card.json or metrics.json is damaged.
    """
    file = model.parent / RunFiles.FACTS
    if os.path.lexists(file):
        try:
            card = make(read_facts(file), repo, model.parent / RunFiles.METRICS)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            if RunFiles.METRICS in str(error):
                raise
            raise ValueError(f"{file} {why(error)}. Move it away, and the model keeps the card that it has.") from None
        replace_file(model / "README.md", str(card))


def draw_grids(pipeline: DiffusionPipeline, folder: Path) -> dict[str, dict[str, str]]:
    """Save a grid of 40 samples for each usual number of sampling steps to `folder`/samples.

    Args:
        pipeline: the pipeline that samples.
        folder: folder of the saved model, without a folder samples.

    Returns:
        The `grids` of `card_facts`. It is empty for latents, which have no picture.
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

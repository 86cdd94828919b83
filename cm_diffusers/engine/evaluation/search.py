"""Search for the best noise levels of a saved model, and for its best guidance scale."""

import json
from pathlib import Path
from typing import Any

from cm_diffusers.core.golden_section import golden_section, search_levels
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.engine.evaluation.judge import Judge, sampler
from cm_diffusers.engine.files import RunFiles, replace_file, why
from cm_diffusers.engine.saved.export import save_pipeline
from cm_diffusers.engine.sharing.card import draw_grids, read_facts
from cm_diffusers.evaluation import check_samples
from cm_diffusers.pipelines.image_pipeline import ImagePipeline


HIGHEST_SCALE = 5.0  # upper end of the search for the guidance scale


def check_search(args: EvaluationArguments, pipeline: ImagePipeline) -> None:
    """Check that `pipeline` can store noise levels, and that its copy would not overwrite it.

    Args:
        args: the settings of the evaluation, with `search_sigmas`.
        pipeline: the model.

    Raises:
        ValueError: the scheduler can't store noise levels, or the copy would be saved over the model.
    """
    scheduler = pipeline.scheduler
    if "default_sigmas" not in scheduler.config:
        raise ValueError(
            f"search_sigmas needs a scheduler that stores noise levels, as consistency and trajectory models have."
            f" This {type(pipeline).__name__} has diffusers' {type(scheduler).__name__}."
        )
    model, copy = Path(args.pretrained_model_name_or_path), args.folder / RunFiles.MODEL
    if model.exists() and copy.exists() and copy.samefile(model):
        raise ValueError(f"search_sigmas saves a copy as {str(copy)!r}, which is the model itself. Change output_dir.")


def improve_sigmas(
    pipeline: ImagePipeline, args: EvaluationArguments, first_seed: int, judge: Judge
) -> dict[str, Any]:
    """Search the best noise levels, store them in the scheduler, and save a copy of the model.

    Args:
        pipeline: the model, whose scheduler is changed in place.
        args: the settings of the evaluation, with `search_sigmas`.
        first_seed: the first seed of the images of the search.
        judge: measures the Fréchet distances.

    Returns:
        The levels before ("from") and after ("to") the search, and all distances, for the report.

    Raises:
        ValueError: the images of the search are too few for the features.
    """
    config, steps = pipeline.scheduler.config, args.search_sigmas
    seeds = range(first_seed, first_seed + args.search_samples)
    check_samples(len(seeds), judge.reference)
    evaluations, [how] = [], args.ways()

    def distance(sigmas: list[float]) -> float:
        title = f"Levels {', '.join(f'{sigma:.3g}' for sigma in sigmas)}"
        found = judge.distance(sampler(pipeline, title, {"sigmas": sigmas}, how), seeds, title)
        evaluations.append([*sigmas, found])
        return found

    start = sampler(pipeline, f"{steps} steps", {"num_inference_steps": steps}, how).facts["sigmas"]
    sigmas, _ = search_levels(distance, start, max(config.sigma_min, config.sigma_data / 50))
    pipeline.scheduler.register_to_config(default_sigmas={**(config.default_sigmas or {}), str(steps): sigmas})
    if judge.accelerator.is_main_process:
        _save_copy(pipeline, args)
    return {
        "num_inference_steps": steps,
        "from": start,
        "to": sigmas,
        "num_samples": len(seeds),
        "first_seed": first_seed,
        "levels_and_frechet_distances": evaluations,
    }


def find_guidance(pipeline: ImagePipeline, args: EvaluationArguments, first_seed: int, judge: Judge) -> dict[str, Any]:
    """Search the guidance scale in [1, 5] with the least Fréchet distance.

    Args:
        pipeline: the model.
        args: the settings of the evaluation, with `search_guidance`.
        first_seed: the first seed of the images of the search.
        judge: measures the Fréchet distances.

    Returns:
        The best scale ("to"; 1 means no guidance) and all distances, for the report.

    Raises:
        ValueError: the images of the search are too few for the features, or the model can't be guided.
    """
    steps = args.search_guidance
    seeds = range(first_seed, first_seed + args.search_samples)
    check_samples(len(seeds), judge.reference)
    evaluations = []

    def distance(scale: float) -> float:
        scale = round(scale, 2)
        [how], title = args.ways(scale), f"Guidance {scale:g}"
        found = judge.distance(sampler(pipeline, title, {"num_inference_steps": steps}, how), seeds, title)
        evaluations.append([scale, found])
        return found

    distance(1.0)
    golden_section(distance, 1.0, HIGHEST_SCALE, tolerance=0.1)
    return {
        "num_inference_steps": steps,
        "to": min(evaluations, key=lambda pair: pair[1])[0],
        "num_samples": len(seeds),
        "first_seed": first_seed,
        "scales_and_frechet_distances": evaluations,
    }


def _save_copy(pipeline: ImagePipeline, args: EvaluationArguments) -> None:
    """Save the model with its new levels and new pictures, and the facts for its card if its run has written them."""
    copy, grids = args.folder / RunFiles.MODEL, {}
    facts = Path(args.pretrained_model_name_or_path).parent / RunFiles.FACTS
    save_pipeline(pipeline, copy, complete=lambda written: grids.update(draw_grids(pipeline, written)))
    if facts.is_file():
        changed = _facts(facts) | {"stock": False, "grids": grids}
        replace_file(args.folder / RunFiles.FACTS, json.dumps(changed, indent=1))


def _facts(file: Path) -> dict[str, Any]:
    try:
        return read_facts(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} {why(error)}. Repair it, or move it away; the copy then gets no card.") from None

"""Evaluate a model, a folder of images, or a run's checkpoints: the entry point of `training/evaluate.py`."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers.utils.logging import disable_progress_bar
from tqdm.auto import tqdm

import cm_diffusers
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data.images import ImageData
from cm_diffusers.engine.evaluation.arguments import BETTER, EvaluationArguments
from cm_diffusers.engine.evaluation.judge import Clock, Judge, JudgedImages, sampler, stored
from cm_diffusers.engine.evaluation.references import build_judge
from cm_diffusers.engine.evaluation.search import check_search, find_guidance, improve_sigmas
from cm_diffusers.engine.evaluation.watch import follow
from cm_diffusers.engine.files import RunFiles, replace_file, why
from cm_diffusers.engine.pictures.curves import QUALITIES, plot_quality
from cm_diffusers.engine.places import check_place
from cm_diffusers.engine.processes import Team, start_accelerator
from cm_diffusers.engine.saved.export import save_pipeline
from cm_diffusers.engine.shareable import ON_THIS_MACHINE, hub_id
from cm_diffusers.engine.sharing.card import draw_grids, read_facts, read_report, renew_card
from cm_diffusers.objectives.options import flags_of
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import load_pipeline


MOVE = "Move it away and repeat the command, or choose another output_dir."


def evaluate(args: EvaluationArguments, data_args: DataArguments) -> dict[str, Any]:
    """Evaluate models or images against a dataset, write metrics.json and quality.png, and return the metrics.

    With several processes all of them sample; the main process measures and writes.

    Args:
        args: the models or images, and how to evaluate them.
        data_args: the dataset.

    Returns:
        The content of metrics.json.

    Raises:
        ValueError: the inputs can't be evaluated; checked before sampling wherever possible.
    """
    _check_data(data_args)
    check_place(args.folder)
    _check_folder(args)
    _check_images(args)
    disable_progress_bar()
    accelerator = start_accelerator()
    clock, judge, report, real = Clock(), None, {}, {}
    results = _earlier_results(args)
    for step, subject in _subjects(args, accelerator, {row["step"] for row in results}):
        sources, numbers = _sources(subject, args), _numbers(subject, args)
        if judge is None:
            judge, facts = build_judge(args, data_args, _shape(subject), len(numbers), accelerator, clock)
            report = _heading(args, subject, len(numbers), judge, facts)
            _check_classes(subject, judge, args)
            if results:
                _check_same(args.folder, report)
            if accelerator.is_main_process and (halves := judge.halves(len(numbers))):
                real = {"real_images": halves}
        if args.search_guidance:
            report["guidance_search"] = find_guidance(subject, args, numbers.stop, judge)
            sources = _sources(subject, args, guidance=report["guidance_search"])
        if args.search_sigmas:
            report["search"] = improve_sigmas(subject, args, numbers.stop, judge)
            accelerator.wait_for_everyone()
            sources = _sources(subject, args, levels=report["search"])
        for source in sources:
            at = {} if step is None else {"step": step}
            title = source.name if step is None else f"Step {step}, {source.name}"
            results.append({"name": source.name, **at, **source.facts, **judge.measure(source, numbers, title)})
        if accelerator.is_main_process:
            if args.keep_best and _is_best(results, step, args.keep_best):
                _keep(subject, args, report, results[-len(sources)])
            _write(args.folder, {**report, **real, "results": results}, clock, accelerator.num_processes)
    if not results:
        raise ValueError(
            f"the run in {args.watch!r} has ended without a checkpoint. Train it for at least one checkpoint first."
        )
    if args.keep_best and accelerator.is_main_process:
        _describe_best(args)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()
    return json.loads((args.folder / RunFiles.METRICS).read_text())


def _check_data(data_args: DataArguments) -> None:
    """Raise ValueError for a dataset option that only training uses."""
    given = [name for name, flag in flags_of(data_args).items() if flag.for_training and getattr(data_args, name)]
    if given:
        raise ValueError(f"{given[0]} applies to training only. An evaluation reads the whole dataset unchanged.")


def _check_folder(args: EvaluationArguments) -> None:
    """Raise ValueError if the results would be written to the card of another model."""
    beside, model, run = args.folder / RunFiles.MODEL, args.pretrained_model_name_or_path, args.watch
    own = args.search_sigmas or (run and args.folder.resolve() == Path(run).resolve())
    own = own or (model and beside.resolve() == Path(model).resolve())
    if beside.is_dir() and not own:
        raise ValueError(f"output_dir {str(args.folder)!r} is the folder of another model. Choose another output_dir.")


def _check_images(args: EvaluationArguments) -> None:
    """Raise ValueError for an output folder of sample.py, because its grid is not a sample."""
    folder = Path(args.images_dir or "")
    if args.images_dir and (folder / "grid.png").is_file() and (folder / "images").is_dir():
        raise ValueError(f"images_dir {args.images_dir!r} holds a grid beside its samples. Give {folder / 'images'}.")


def _subjects(
    args: EvaluationArguments, accelerator: Accelerator, done: set[int]
) -> Iterator[tuple[int | None, ImagePipeline | ImageData]]:
    """Yield (training step or None, model or images) for everything to be evaluated."""
    if args.images_dir:
        settings, main = DataArguments(train_data_dir=args.images_dir), accelerator.is_main_process
        yield None, ImageData(settings, class_conditional=False, show_progress=main, team=Team(accelerator))
    elif args.watch:
        yield from follow(Path(args.watch), accelerator, done, args.folder / ".watched")
    else:
        pipeline = load_pipeline(args.pretrained_model_name_or_path, args.revision, dtype=torch.float32)
        if args.search_sigmas:
            check_search(args, pipeline)
        # a copy, because kernels can round differently for weights at other memory addresses
        yield None, copy.deepcopy(pipeline).to(accelerator.device)


def _shape(subject: ImagePipeline | ImageData) -> tuple[int, int, int]:
    """(channels, height, width) of the images."""
    return subject.image_shape if isinstance(subject, ImagePipeline) else (subject.channels, *subject.resolution)


def _numbers(subject: ImagePipeline | ImageData, args: EvaluationArguments) -> range:
    """The seeds of the images to be measured, or their indices in a folder."""
    if isinstance(subject, ImagePipeline):
        return range(args.seed, args.seed + (args.num_samples or 10_000))
    there = len(subject.images)
    if (args.num_samples or 0) > there:
        raise ValueError(
            f"num_samples is {args.num_samples}, but images_dir {args.images_dir!r} holds only {there} images."
        )
    return range(args.num_samples or there)


def _sources(
    subject: ImagePipeline | ImageData,
    args: EvaluationArguments,
    levels: dict[str, Any] | None = None,
    guidance: dict[str, Any] | None = None,
) -> list[JudgedImages]:
    """The sources of images to evaluate: each number of steps and each list of levels, with each way to sample.

    The start and the result of a search of levels or guidance are added.

    Raises:
        ValueError: the model can't be sampled in one of these ways.
    """
    if isinstance(subject, ImageData):
        return [stored(subject)]
    subject.set_progress_bar_config(disable=True)
    steps, lists = args.num_inference_steps or list(subject.default_steps), args.sigma_lists()
    ways = args.ways()
    if levels is not None:
        steps, lists = [*steps, levels["num_inference_steps"]], [levels["from"], *lists]
    if guidance is not None:
        steps, ways = [*steps, guidance["num_inference_steps"]], args.ways(1.0, guidance["to"])
    places = {f"{n} step{'s' * (n > 1)}": {"num_inference_steps": n} for n in steps}
    places |= {f"sigmas {', '.join(f'{s:g}' for s in sigmas)}": {"sigmas": sigmas} for sigmas in lists}
    return [sampler(subject, name + _named(how), at, how) for how in ways for name, at in places.items()]


def _named(how: dict[str, Any]) -> str:
    """The end of a result's name: its solver, gamma and guidance."""
    parts = {"solver": "{}", "gamma": "gamma {:g}", "guidance_scale": "guidance {:g}"}
    return "".join(f", {text.format(how[key])}" for key, text in parts.items() if key in how)


def _heading(
    args: EvaluationArguments, subject: ImagePipeline | ImageData, count: int, judge: Judge, facts: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the results depend on."""
    extractor = judge.extractor
    name = "a local network" if Path(extractor.name).exists() else extractor.name  # the card must show no path
    packages = {"cm_diffusers": cm_diffusers, "diffusers": diffusers, "torch": torch}
    return {
        "model": hub_id(args.pretrained_model_name_or_path) or ON_THIS_MACHINE,
        "revision": args.revision,
        **facts,
        "reference": facts["reference"] | {"extractor": name},
        "extractor": {"name": name, "fingerprint": extractor.fingerprint},
        "num_samples": count,
        "seed": args.seed,
        "class_labels": _which_labels(subject),
        "sampling": args.ways() if any(args.ways()) else None,
        "versions": {name: package.__version__ for name, package in packages.items()},
    }


def _check_classes(subject: ImagePipeline | ImageData, judge: Judge, args: EvaluationArguments) -> None:
    """Warn if the labels don't fit for label agreement. ValueError if `keep_best` needs it."""
    known = judge.labels is not None and isinstance(subject, ImagePipeline) and subject.classes is not None
    same = known and judge.labels.of(subject.classes, subject.id2label) is not None
    if known and not same and judge.accelerator.is_main_process:
        tqdm.write("Label agreement is not measured, because the model has classes that the dataset lacks.")
    if args.keep_best == "label_agreement" and not same:
        unlabelled = "Give --label_column, so that the labels of the dataset are read."
        fault = unlabelled if judge.labels is None else "The model has no classes, or classes that the dataset lacks."
        raise ValueError(f"keep_best label_agreement needs a model and a dataset with the same classes. {fault}")


def _is_best(results: list[dict[str, Any]], step: int, metric: str) -> bool:
    """Whether the checkpoint of `step` is better than all others, by the first result of each."""
    first = {}
    for row in results:
        first.setdefault(row["step"], row[metric])
    sign = 1 if BETTER[metric] == "less" else -1
    return all(sign * first[step] < sign * value for other, value in first.items() if other != step)


def _keep(pipeline: ImagePipeline, args: EvaluationArguments, report: dict[str, Any], row: dict[str, Any]) -> None:
    """Save the model of a checkpoint, as its run would at its end, with the metrics by which it was chosen."""
    folder = args.folder / RunFiles.BEST
    save_pipeline(pipeline, folder / RunFiles.MODEL, complete=lambda written: draw_grids(pipeline, written))
    text = json.dumps({**report, "kept_by": args.keep_best, "results": [row]}, indent=1)
    replace_file(folder / RunFiles.METRICS, text + "\n")
    metric = args.keep_best.replace("_", " ")
    tqdm.write(f"Step {row['step']} has the best {metric} so far, {row[args.keep_best]:.4g}, and is kept in {folder}.")


def _describe_best(args: EvaluationArguments) -> None:
    """Give the best checkpoint the model card of its run, with the checkpoint's step, if the run has a card."""
    best, run = args.folder / RunFiles.BEST, Path(args.watch)
    if (run / RunFiles.FACTS).is_file() and (best / RunFiles.METRICS).is_file():
        [row] = _read_report(best)["results"]
        facts = read_facts(run / RunFiles.FACTS) | {"steps": row["step"]}
        replace_file(best / RunFiles.FACTS, json.dumps(facts, indent=1))
        renew_card(best / RunFiles.MODEL, f"{run.resolve().name}-best")


def _which_labels(subject: ImagePipeline | ImageData) -> str | None:
    """How the label of an image follows from its seed, for the report."""
    if subject.num_classes is None:
        return None
    there = len(subject.classes)
    which = "" if there == subject.num_classes else f", among the labels that have images ({there})"
    return f"seed modulo {there}{which}"


def _write(folder: Path, report: dict[str, Any], clock: Clock, processes: int) -> None:
    """Write metrics.json and quality.png, and renew the card of a model in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report, "time": {"processes": processes, **clock.seconds}}, indent=1)
    replace_file(folder / RunFiles.METRICS, text + "\n")
    plot_quality(report["results"], folder / RunFiles.QUALITY, report.get("real_images"))
    if (folder / RunFiles.MODEL).is_dir():
        renew_card(folder / RunFiles.MODEL, folder.resolve().name)


def _earlier_results(args: EvaluationArguments) -> list[dict[str, Any]]:
    """The results of an earlier call for a watched run. ValueError if this call would overwrite other results."""
    file = args.folder / RunFiles.METRICS
    if not os.path.lexists(file):
        return []
    results = _read_report(args.folder)["results"]
    watched = any("step" in row for row in results)
    if watched != bool(args.watch):
        kind = "the series of a watched run" if watched else "results of one model, not of a watched run"
        raise ValueError(f"{file} holds {kind}. Choose another output_dir.")
    measured = {metric for _, *metrics in QUALITIES for metric in metrics}
    if watched and not all(measured <= row.keys() for row in results):
        raise ValueError(f"{file} lacks some of the metrics of its series. {MOVE}")
    return results if watched else []


def _read_report(folder: Path) -> dict[str, Any]:
    """The metrics.json of an earlier call. ValueError, naming the file, if it is damaged."""
    try:
        return read_report(folder / RunFiles.METRICS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / RunFiles.METRICS} {why(error)}. {MOVE}") from None


def _check_same(folder: Path, report: dict[str, Any]) -> None:
    """Raise ValueError unless the earlier results in `folder` were measured in the same way."""
    earlier = _read_report(folder)
    for key, value in report.items():
        if earlier.get(key) != value:
            raise ValueError(
                f"{folder / RunFiles.METRICS} holds results of another {key}: {earlier.get(key)!r} instead of"
                f" {value!r}. Choose another output_dir."
            )

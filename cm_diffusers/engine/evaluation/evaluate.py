"""A model, a folder of images or the checkpoints of a run against a dataset: what `training/evaluate.py` calls."""

import copy
import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
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
from cm_diffusers.engine.processes import start_accelerator
from cm_diffusers.engine.saved.export import save_pipeline
from cm_diffusers.engine.shareable import ON_THIS_MACHINE, hub_id
from cm_diffusers.engine.sharing.card import draw_grids, read_facts, read_report, renew_card
from cm_diffusers.objectives.options import flags_of
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import load_pipeline


MOVE = "Move it away, or choose another output_dir; the same command then measures anew."


def evaluate(args: EvaluationArguments, data_args: DataArguments) -> dict[str, Any]:
    """Measure what `args` name against the dataset; leave metrics.json and quality.png, and give what the first holds.

    Started by several processes, all of them sample; the main one measures and writes.

    Raises:
        ValueError: what can't be measured. All that can be known before sampling is said before it.
    """
    _check_data(data_args)
    check_place(args.folder)
    _check_folder(args)
    _check_images(args)
    disable_progress_bar()
    # the others wait while the main process measures, for longer than the usual half an hour where there is much
    accelerator = start_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])
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
        raise ValueError(f"the run in {args.watch!r} has ended and holds no checkpoint.")
    if args.keep_best and accelerator.is_main_process:
        _describe_best(args)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()
    return json.loads((args.folder / RunFiles.METRICS).read_text())


def _check_data(data_args: DataArguments) -> None:
    """Raise ValueError for what is for training only."""
    given = [name for name, flag in flags_of(data_args).items() if flag.for_training and getattr(data_args, name)]
    if given:
        raise ValueError(f"{given[0]} is for training; here the dataset is read as it is, and whole.")


def _check_folder(args: EvaluationArguments) -> None:
    """Raise ValueError where the numbers would go on the card of another model."""
    beside, model, run = args.folder / RunFiles.MODEL, args.pretrained_model_name_or_path, args.watch
    own = args.search_sigmas or (run and args.folder.resolve() == Path(run).resolve())
    own = own or (model and beside.resolve() == Path(model).resolve())
    if beside.is_dir() and not own:
        raise ValueError(f"output_dir {str(args.folder)!r} is the folder of another model; choose another.")


def _check_images(args: EvaluationArguments) -> None:
    """Raise ValueError for the folder of sample.py, whose grid is no sample."""
    folder = Path(args.images_dir or "")
    if args.images_dir and (folder / "grid.png").is_file() and (folder / "images").is_dir():
        raise ValueError(f"images_dir {args.images_dir!r} holds a grid beside its samples; give {folder / 'images'}.")


def _subjects(
    args: EvaluationArguments, accelerator: Accelerator, done: set[int]
) -> Iterator[tuple[int | None, ImagePipeline | ImageData]]:
    """What is to be measured, and after how many steps of training where that is known."""
    if args.images_dir:
        settings, main = DataArguments(train_data_dir=args.images_dir), accelerator.is_main_process
        with accelerator.main_process_first():
            data = ImageData(settings, class_conditional=False, show_progress=main)
        yield None, data
    elif args.watch:
        yield from follow(Path(args.watch), accelerator, done, args.folder / ".watched")
    else:
        pipeline = load_pipeline(args.pretrained_model_name_or_path, args.revision, dtype=torch.float32)
        if args.search_sigmas:
            check_search(args, pipeline)
        # a copy, as loaded weights can lie at addresses where some kernels round otherwise
        yield None, copy.deepcopy(pipeline).to(accelerator.device)


def _shape(subject: ImagePipeline | ImageData) -> tuple[int, int, int]:
    """(channels, height, width) of its images."""
    return subject.image_shape if isinstance(subject, ImagePipeline) else (subject.channels, *subject.resolution)


def _numbers(subject: ImagePipeline | ImageData, args: EvaluationArguments) -> range:
    """The seeds, or places, of the images that are measured."""
    if isinstance(subject, ImagePipeline):
        return range(args.seed, args.seed + (args.num_samples or 10_000))
    there = len(subject.images)
    if (args.num_samples or 0) > there:
        raise ValueError(
            f"num_samples is {args.num_samples}, and images_dir {args.images_dir!r} holds {there} images."
        )
    return range(args.num_samples or there)


def _sources(
    subject: ImagePipeline | ImageData,
    args: EvaluationArguments,
    levels: dict[str, Any] | None = None,
    guidance: dict[str, Any] | None = None,
) -> list[JudgedImages]:
    """Where its images come from: each number of steps, each list of levels.

    What a search of levels or of guidance began with and found comes beside these.

    Raises:
        ValueError: the model can't be sampled so.
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
    """The end of a result's name, as its numbers are those of this solver, gamma and guidance."""
    parts = {"solver": "{}", "gamma": "gamma {:g}", "guidance_scale": "guidance {:g}"}
    return "".join(f", {text.format(how[key])}" for key, text in parts.items() if key in how)


def _heading(
    args: EvaluationArguments, subject: ImagePipeline | ImageData, count: int, judge: Judge, facts: dict[str, Any]
) -> dict[str, Any]:
    """All that a result depends on."""
    extractor = judge.extractor
    name = "a local network" if Path(extractor.name).exists() else extractor.name  # it goes on the model's card
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
    """Say where label agreement can't be measured though labels were read; ValueError where it decides."""
    known = judge.labels is not None and isinstance(subject, ImagePipeline) and subject.classes is not None
    same = known and judge.labels.of(subject.classes, subject.id2label) is not None
    if known and not same and judge.accelerator.is_main_process:
        tqdm.write("Label agreement is not measured: the model has classes that the dataset has not.")
    if args.keep_best == "label_agreement" and not same:
        fault = "give --label_column" if judge.labels is None else "the model has no classes, or others"
        raise ValueError(f"keep_best label_agreement needs labels of the dataset that the model has as well: {fault}.")


def _is_best(results: list[dict[str, Any]], step: int, metric: str) -> bool:
    """Whether no earlier checkpoint is as good as that of `step`, of which each has its first result counted."""
    first = {}
    for row in results:
        first.setdefault(row["step"], row[metric])
    sign = 1 if BETTER[metric] == "less" else -1
    return all(sign * first[step] < sign * value for other, value in first.items() if other != step)


def _keep(pipeline: ImagePipeline, args: EvaluationArguments, report: dict[str, Any], row: dict[str, Any]) -> None:
    """Save the model of a checkpoint, as its run would at its end, and say by which numbers it was chosen."""
    folder = args.folder / RunFiles.BEST
    save_pipeline(pipeline, folder / RunFiles.MODEL, complete=lambda written: draw_grids(pipeline, written))
    text = json.dumps({**report, "kept_by": args.keep_best, "results": [row]}, indent=1)
    replace_file(folder / RunFiles.METRICS, text + "\n")
    metric = args.keep_best.replace("_", " ")
    tqdm.write(f"Best {metric} so far, {row[args.keep_best]:.4g}, at step {row['step']}: kept in {folder}.")


def _describe_best(args: EvaluationArguments) -> None:
    """Give the model that was kept the card of its run, with its own step, once there is one."""
    best, run = args.folder / RunFiles.BEST, Path(args.watch)
    if (run / RunFiles.FACTS).is_file() and (best / RunFiles.METRICS).is_file():
        [row] = _read_report(best)["results"]
        facts = read_facts(run / RunFiles.FACTS) | {"steps": row["step"]}
        replace_file(best / RunFiles.FACTS, json.dumps(facts, indent=1))
        renew_card(best / RunFiles.MODEL, f"{run.resolve().name}-best")


def _which_labels(subject: ImagePipeline | ImageData) -> str | None:
    """Which label the image of a seed has."""
    if subject.num_classes is None:
        return None
    there = len(subject.classes)
    which = "" if there == subject.num_classes else f", among the labels that have images ({there})"
    return f"seed modulo {there}{which}"


def _write(folder: Path, report: dict[str, Any], clock: Clock, processes: int) -> None:
    """metrics.json, quality.png, and the numbers on the card of the model beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report, "time": {"processes": processes, **clock.seconds}}, indent=1)
    replace_file(folder / RunFiles.METRICS, text + "\n")
    plot_quality(report["results"], folder / RunFiles.QUALITY, report.get("real_images"))
    if (folder / RunFiles.MODEL).is_dir():
        renew_card(folder / RunFiles.MODEL, folder.resolve().name)


def _earlier_results(args: EvaluationArguments) -> list[dict[str, Any]]:
    """What an earlier call has measured of a watched run. Raises ValueError where that or other work would be lost."""
    file = args.folder / RunFiles.METRICS
    if not os.path.lexists(file):
        return []
    results = _read_report(args.folder)["results"]
    watched = any("step" in row for row in results)
    if watched != bool(args.watch):
        kind = "the series of a watched run" if watched else "results of one model, not of a watched run"
        raise ValueError(f"{file} holds {kind}; choose another output_dir.")
    measured = {metric for _, *metrics in QUALITIES for metric in metrics}
    if watched and not all(measured <= row.keys() for row in results):
        raise ValueError(f"{file} lacks some of the metrics of its series. {MOVE}")
    return results if watched else []


def _read_report(folder: Path) -> dict[str, Any]:
    """The metrics.json of an earlier call. Raises ValueError, naming the file, where it is damaged."""
    try:
        return read_report(folder / RunFiles.METRICS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / RunFiles.METRICS} {why(error)}. {MOVE}") from None


def _check_same(folder: Path, report: dict[str, Any]) -> None:
    """Raise ValueError unless what is there was measured as this will be."""
    earlier = _read_report(folder)
    for key, value in report.items():
        if earlier.get(key) != value:
            raise ValueError(
                f"{folder / RunFiles.METRICS} holds results of another {key}: {earlier.get(key)!r}, and here it is"
                f" {value!r}. Choose another output_dir."
            )

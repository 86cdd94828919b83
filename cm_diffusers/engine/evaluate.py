"""A model, a folder of images or the checkpoints of a run against a dataset: what `training/evaluate.py` calls."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast, broadcast_object_list
from diffusers.utils.logging import disable_progress_bar
from tqdm.auto import tqdm

import cm_diffusers
from cm_diffusers.engine.card import FACTS, HERE, METRICS, draw_grids, hub_id, renew_card
from cm_diffusers.engine.config import DataArguments
from cm_diffusers.engine.data import ImageData
from cm_diffusers.engine.export import save_pipeline
from cm_diffusers.engine.judge import Clock, Judge, Source, sampler, stored
from cm_diffusers.engine.pictures import plot_quality
from cm_diffusers.engine.sigma_search import search_sigmas
from cm_diffusers.engine.watch import follow
from cm_diffusers.evaluation import Extractor, check, load_extractor, reference_features
from cm_diffusers.objectives.options import check_between, option
from cm_diffusers.pipelines.image_pipeline import ImagePipeline
from cm_diffusers.sampling import load_pipeline


PICTURE = "quality.png"
BATCH = 1000  # images of the dataset at once


@dataclass(frozen=True)
class EvaluationArguments:
    pretrained_model_name_or_path: str | None = option(None, "The model, a folder or a Hub id; or else")
    images_dir: str | None = option(None, "a folder of images; or else")
    watch: str | None = option(None, "the folder of a training run: each checkpoint, until the run ends.")
    revision: str | None = option(None, "Revision of the model on the Hub.")
    num_samples: int | None = option(None, "How many images. Default: 10,000, or all of images_dir.")
    num_inference_steps: list[int] | None = option(None, "Numbers of steps, as 1 2 4. Default: the model's usual ones.")
    sigmas: list[str] | None = option(None, "Lists of noise levels to sample at as well, as 80,0.8 80,5,0.5.")
    search_sigmas: int | None = option(
        None, "Find the best noise levels for so many steps, and save a copy of the model that takes them."
    )
    search_samples: int = option(2000, "Images per distance in that search; their seeds are not those of the results.")
    seed: int = option(0, "Image i is made from seed + i alone; classes take turns.")
    batch_size: int = option(250, "Images made at once by each process.")
    feature_extractor: str | None = option(
        None, "inception, dinov2, classifier (a small one, trained on the labelled dataset), or a classifier's Hub id."
    )
    feature_weights: str | None = option(None, "The extractor's weights, a file or folder, instead of a download.")
    reference_cache: str = option("runs/references", "Folder that keeps the dataset's features.")
    output_dir: str | None = option(
        None, "Gets metrics.json and quality.png. Default: the folder of the run that made the model, else runs/evaluation."
    )

    _argument_group_name = "evaluation"

    def __post_init__(self) -> None:
        given = [self.pretrained_model_name_or_path, self.images_dir, self.watch]
        if sum(name is not None for name in given) != 1:
            raise ValueError("Give exactly one of pretrained_model_name_or_path, images_dir and watch.")
        if self.pretrained_model_name_or_path is None and (self.search_sigmas or self.revision):
            raise ValueError("search_sigmas and revision are for --pretrained_model_name_or_path.")
        if self.images_dir is not None and (self.num_inference_steps or self.sigmas):
            raise ValueError("num_inference_steps and sigmas are for models, and images_dir is given.")
        for name in ("num_samples", "search_samples", "batch_size"):
            if getattr(self, name) is not None:
                check_between(name, getattr(self, name), 1, 1 << 40)
        if self.search_sigmas is not None:
            check_between("search_sigmas", self.search_sigmas, 2, 10)
        check_between("seed", self.seed, 0, 1 << 60)
        self.sigma_lists()

    def sigma_lists(self) -> list[list[float]]:
        """The lists of noise levels. Raises ValueError where they can't be read."""
        lists = self.sigmas or []
        if len(lists) > 1 and not any("," in one for one in lists):
            raise ValueError(f"sigmas takes one word per list; write {','.join(lists)} for these levels as one.")
        try:
            return [[float(sigma) for sigma in one.split(",")] for one in lists]
        except ValueError:
            raise ValueError(f"sigmas takes lists of numbers, as 80,0.8; got {', '.join(lists)}.") from None

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.output_dir or self.watch:
            return Path(self.output_dir or self.watch)
        run = Path(self.pretrained_model_name_or_path or "").parent
        has_card = (run / FACTS).is_file() and self.search_sigmas is None
        return run if has_card else Path("runs/evaluation")


def evaluate(args: EvaluationArguments, data_args: DataArguments) -> dict[str, Any]:
    """Measure what `args` name against the dataset, and leave metrics.json and quality.png; gives what the first holds.

    Started by several processes, all of them sample; the main one measures and writes.

    Raises:
        ValueError: what can't be measured. All that can be known before sampling is said before it.
    """
    _check_data(data_args)
    disable_progress_bar()
    # the others wait while the main process measures, for longer than the usual half an hour where there is much
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])
    clock, judge, report = Clock(), None, {}
    results = _earlier_results(args) if args.watch else []
    with clock("total"):
        for step, subject in _subjects(args, accelerator, {row["step"] for row in results}):
            sources, numbers = _sources(subject, args), _numbers(subject, args)
            if judge is None:
                judge, facts = _judge(args, data_args, _shape(subject), len(numbers), accelerator, clock)
                report = _heading(args, len(numbers), judge, facts)
                if results:
                    _check_same(args.folder, report)
            if args.search_sigmas:
                report["search"] = _search(subject, args, numbers.stop, judge)
                accelerator.wait_for_everyone()
                sources = _sources(subject, args, report["search"])
            for source in sources:
                at = {} if step is None else {"step": step}
                title = source.name if step is None else f"Step {step}, {source.name}"
                results.append({"name": source.name, **at, **source.facts, **judge.measure(source, numbers, title)})
            if accelerator.is_main_process:
                _write(args.folder, {**report, "results": results}, clock)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {**report, "results": results, "time": _seconds(clock)}


def _check_data(data_args: DataArguments) -> None:
    """Raise ValueError for what is for training only."""
    given = [name for name in ("streaming", "random_flip", "cache_latents") if getattr(data_args, name)]
    if given:
        raise ValueError(f"{given[0]} is for training; here the dataset is read as it is, and whole.")


def _subjects(
    args: EvaluationArguments, accelerator: Accelerator, done: set[int]
) -> Iterator[tuple[int | None, ImagePipeline | ImageData]]:
    """What is to be measured, and after how many steps of training where that is known."""
    if args.images_dir:
        yield None, ImageData(DataArguments(train_data_dir=args.images_dir), False)
    elif args.watch:
        yield from follow(Path(args.watch), accelerator, done, args.folder / ".watched")
    else:
        pipeline = load_pipeline(args.pretrained_model_name_or_path, args.revision, torch_dtype=torch.float32)
        if args.search_sigmas:
            _check_search(args, pipeline)
        yield None, pipeline.to(accelerator.device)


def _shape(subject: ImagePipeline | ImageData) -> tuple[int, int, int]:
    """(channels, height, width) of its images."""
    return subject.image_shape if isinstance(subject, ImagePipeline) else (subject.channels, *subject.resolution)


def _numbers(subject: ImagePipeline | ImageData, args: EvaluationArguments) -> range:
    """The seeds, or places, of the images that are measured."""
    if isinstance(subject, ImagePipeline):
        return range(args.seed, args.seed + (args.num_samples or 10_000))
    there = len(subject.images)
    if (args.num_samples or 0) > there:
        raise ValueError(f"num_samples is {args.num_samples}, and images_dir {args.images_dir!r} holds {there} images.")
    return range(args.num_samples or there)


def _sources(
    subject: ImagePipeline | ImageData, args: EvaluationArguments, search: dict[str, Any] | None = None
) -> list[Source]:
    """Where its images come from: each number of steps, each list of levels; what a search began with and found, too.

    Raises:
        ValueError: the model can't be sampled so.
    """
    if isinstance(subject, ImageData):
        return [stored(subject)]
    subject.set_progress_bar_config(disable=True)
    steps, lists = args.num_inference_steps or list(subject.default_steps), args.sigma_lists()
    if search is not None:
        steps, lists = [*steps, search["num_inference_steps"]], [search["from"], *lists]
    sources = [sampler(subject, f"{n} step{'s' * (n > 1)}", num_inference_steps=n) for n in dict.fromkeys(steps)]
    return sources + [sampler(subject, f"sigmas {', '.join(f'{s:g}' for s in sigmas)}", sigmas=sigmas) for sigmas in lists]


# --- what it is measured against


def _judge(
    args: EvaluationArguments,
    data_args: DataArguments,
    shape: tuple[int, int, int],
    count: int,
    accelerator: Accelerator,
    clock: Clock,
) -> tuple[Judge, dict[str, Any]]:
    """The dataset, read, with its features, for `count` images of this shape; and what is said of it."""
    main = accelerator.is_main_process
    with clock("reference"):
        name = args.feature_extractor or _best_extractor(args, accelerator)
        data = ImageData(data_args, class_conditional=name == "classifier", show_progress=main)
        found = (data.channels, *data.resolution)
        if found != shape:
            raise ValueError(
                f"the images to be measured are {_by(shape)}, those of the dataset {_by(found)} (channels x height x"
                f" width); --resolution {shape[1]} {shape[2]} --channels {shape[0]} makes the dataset's like them."
            )
        extractor = _extractor(name, args, data, accelerator)
        extractor.check(shape)
        batches = _Batches(data, main)
        with accelerator.main_process_first():  # the others find its features in the cache
            reference = reference_features(batches, extractor, args.reference_cache)
    check(count, reference)
    known = "digits" if data_args.dataset_name == "digits" else hub_id(data_args.dataset_name)
    facts = {"dataset": known or HERE, "split": data_args.split, "reference": reference.facts}
    return Judge(extractor, reference, accelerator, args.batch_size, clock), facts


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


class _Batches:
    """The images of a dataset in [0, 1], batch by batch, as often as they are wanted."""

    def __init__(self, data: ImageData, show_progress: bool):
        self.data, self.show_progress = data, show_progress

    def __iter__(self) -> Iterator[torch.Tensor]:
        places = torch.arange(len(self.data.images)).split(BATCH)
        for part in tqdm(places, desc="Dataset", unit="batch", disable=not self.show_progress, leave=False):
            yield self.data.rows(part.tolist()).float() / 255


def _best_extractor(args: EvaluationArguments, accelerator: Accelerator) -> str:
    """inception where its weights are to be had, else classifier."""
    name = "inception"
    if accelerator.is_main_process:
        try:
            load_extractor(name, args.feature_weights)
        except ValueError as error:
            if args.feature_weights:
                raise
            tqdm.write(f"Features come from a small classifier of this dataset, as there is no better one: {error}")
            name = "classifier"
    return broadcast_object_list([name])[0]


def _extractor(name: str, args: EvaluationArguments, data: ImageData, accelerator: Accelerator) -> Extractor:
    """The extractor, the same on all processes."""
    labelled = None
    if name == "classifier":
        if not torch.is_tensor(data.images):
            raise ValueError("the dataset is too large to train a classifier on; name another feature_extractor.")
        labelled = data.images.float() / 255, data.labels
    with accelerator.main_process_first():  # who may have to download it
        extractor = load_extractor(name, args.feature_weights, labelled, accelerator.device)
    extractor.network.load_state_dict(broadcast(dict(extractor.network.state_dict())))  # training may round otherwise
    return extractor


# --- noise levels


def _check_search(args: EvaluationArguments, pipeline: ImagePipeline) -> None:
    scheduler = pipeline.scheduler
    if "default_sigmas" not in scheduler.config:
        raise ValueError(
            f"search_sigmas: a {type(pipeline).__name__} samples by diffusers' {type(scheduler).__name__}, which has no"
            " place for noise levels. Compare some by --sigmas, and pass the best to its calls."
        )
    model, copy = Path(args.pretrained_model_name_or_path), args.folder / "pipeline"
    if model.exists() and copy.exists() and copy.samefile(model):
        raise ValueError(f"search_sigmas saves a copy as {str(copy)!r}, which is the model itself; change output_dir.")


def _search(pipeline: ImagePipeline, args: EvaluationArguments, first_seed: int, judge: Judge) -> dict[str, Any]:
    """Find the best levels, give them to the scheduler, save the pipeline; and tell what was found."""
    config, steps = pipeline.scheduler.config, args.search_sigmas
    seeds = range(first_seed, first_seed + args.search_samples)
    check(len(seeds), judge.reference)
    evaluations = []

    def distance(sigmas: list[float]) -> float:
        title = f"Levels {', '.join(f'{sigma:.3g}' for sigma in sigmas)}"
        found = judge.distance(sampler(pipeline, title, sigmas=sigmas), seeds, title)
        evaluations.append([*sigmas, found])
        return found

    start = sampler(pipeline, f"{steps} steps", num_inference_steps=steps).facts["sigmas"]
    sigmas, _ = search_sigmas(distance, start, max(config.sigma_min, config.sigma_data / 50))
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


def _save_copy(pipeline: ImagePipeline, args: EvaluationArguments) -> None:
    """The model with its new levels, with new pictures and, where its run knew what to say of it, a card to come."""
    grids, facts = {}, Path(args.pretrained_model_name_or_path).parent / FACTS
    save_pipeline(pipeline, args.folder / "pipeline", complete=lambda folder: grids.update(draw_grids(pipeline, folder)))
    if facts.is_file():
        changed = json.loads(facts.read_text()) | {"stock": False, "grids": grids}
        (args.folder / FACTS).write_text(json.dumps(changed, indent=1))


# --- what is left


def _heading(args: EvaluationArguments, count: int, judge: Judge, facts: dict[str, Any]) -> dict[str, Any]:
    """All that a result depends on."""
    extractor = judge.extractor
    packages = {"cm_diffusers": cm_diffusers, "diffusers": diffusers, "torch": torch}
    return {
        "model": hub_id(args.pretrained_model_name_or_path) or HERE,
        "revision": args.revision,
        **facts,
        "extractor": {"name": extractor.name, "fingerprint": extractor.fingerprint},
        "num_samples": count,
        "seed": args.seed,
        "versions": {name: package.__version__ for name, package in packages.items()},
    }


def _seconds(clock: Clock) -> dict[str, float]:
    return {name: round(seconds, 2) for name, seconds in clock.items()}


def _write(folder: Path, report: dict[str, Any], clock: Clock) -> None:
    """metrics.json, quality.png, and the numbers on the card of the model beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report, "time": _seconds(clock)}, indent=1)
    (folder / f".{METRICS}").write_text(text + "\n")
    os.replace(folder / f".{METRICS}", folder / METRICS)
    plot_quality(report["results"], folder / PICTURE)
    if (folder / "pipeline").is_dir():
        renew_card(folder / "pipeline", folder.resolve().name)


def _earlier_results(args: EvaluationArguments) -> list[dict[str, Any]]:
    """What an earlier call has measured of this run."""
    file = args.folder / METRICS
    return [row for row in json.loads(file.read_text())["results"] if "step" in row] if file.is_file() else []


def _check_same(folder: Path, report: dict[str, Any]) -> None:
    """Raise ValueError unless what is there was measured as this will be."""
    earlier = json.loads((folder / METRICS).read_text())
    for key, value in report.items():
        if earlier.get(key) != value:
            raise ValueError(
                f"{folder / METRICS} holds results of another {key}: {earlier.get(key)!r}, and here it is {value!r}."
                " Choose another output_dir."
            )

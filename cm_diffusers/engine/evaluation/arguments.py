"""Settings of an evaluation, without those of the dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm_diffusers.engine.files import RunFiles
from cm_diffusers.objectives.options import SOME_STEPS, Options, option


BETTER = {  # whether the better model has less or more of a metric
    "frechet_distance": "less",
    "kernel_distance": "less",
    "precision": "more",
    "recall": "more",
    "density": "more",
    "coverage": "more",
    "label_agreement": "more",
}


@dataclass(frozen=True)
class EvaluationArguments(Options):
    """Settings of `training/evaluate.py`; the help text of each describes it.

    Raises:
        ValueError: a value is out of its range, or settings contradict each other.
    """

    pretrained_model_name_or_path: str | None = option(
        None,
        "Model to evaluate, a folder or a Hub id. Give exactly one of this, --images_dir and --watch.",
        place="path or Hub id",
    )
    images_dir: str | None = option(None, "Folder of images to evaluate instead of a model.", place="path")
    watch: str | None = option(
        None, "Folder of a training run, of which each checkpoint is evaluated until the run ends.", place="path"
    )
    revision: str | None = option(None, "Revision of the model on the Hub. Default: its main branch.")
    num_samples: int | None = option(
        None, "Number of images to evaluate. Default: 10,000 of a model, or all of --images_dir.", SOME_STEPS
    )
    num_inference_steps: list[int] | None = option(
        None, "Numbers of sampling steps to evaluate, such as 1 2 4. Default: the model's usual numbers.", SOME_STEPS
    )
    sigmas: list[str] | None = option(
        None, "Lists of noise levels to evaluate beside the numbers of steps, such as 80,0.8 80,5,0.5. Default: none."
    )
    guidance_scale: list[float] | None = option(
        None,
        "Scales of classifier-free guidance, such as 1 1.5 2, where 1 means no guidance. Each is evaluated with all"
        " numbers of steps and lists of noise levels. Default: 1.",
        "[0, 1e3]",
    )
    guidance_interval: list[float] | None = option(
        None, "Lowest and highest noise level with guidance. Default: guidance at all levels.", "[0, inf]"
    )
    solver: str | None = option(
        None,
        "Solver of a diffusion or trajectory model. Default: the model's usual solver.",
        choices=["gamma", "heun", "euler", "ddim", "sde", "sde_2m"],
    )
    gamma: float | None = option(
        None, "Share of new noise between the jumps of a trajectory model. Default: the model's own value.", "[0, 1]"
    )
    search_sigmas: int | None = option(
        None,
        "Search the best noise levels for this number of sampling steps, and save a copy of the model with them.",
        "[2, 10]",
    )
    search_guidance: int | None = option(
        None,
        "Search the best guidance scale between 1 and 5 for this number of sampling steps. It is evaluated beside"
        " scale 1.",
        SOME_STEPS,
    )
    search_samples: int = option(
        2000,
        "Images for each distance in --search_sigmas and --search_guidance. Their seeds differ from those of the"
        " results.",
        SOME_STEPS,
    )
    keep_best: str | None = option(
        None,
        "Metric by which --watch keeps the best checkpoint as a model in best/pipeline of the output folder. The first"
        " number of sampling steps counts. Default: no checkpoint is kept.",
        choices=[*BETTER],
    )
    seed: int = option(0, "Image i is generated from seed + i alone. Classes take turns.", "[0, 1e18]")
    batch_size: int = option(250, "Images that each process generates at once.", SOME_STEPS)
    feature_extractor: str | None = option(
        None,
        "Network that computes the features: inception (as for FID), dinov2, classifier (a small one, trained on the"
        " labelled dataset), the Hub id of an image classifier, or module:name of an nn.Module. Default: inception if"
        " its weights are available, else classifier.",
        place="path or Hub id",
        words=("inception", "dinov2", "classifier"),
    )
    feature_weights: str | None = option(
        None,
        "Weights of the feature extractor instead of the default download: a file for inception, a folder or Hub id"
        " for dinov2.",
        place="path or Hub id",
    )
    reference_cache: str = option("runs/references", "Folder that caches the features of the dataset.", place="path")
    output_dir: str | None = option(
        None,
        "Folder for metrics.json and quality.png. Default: the folder of the model's training run, else"
        " runs/evaluation.",
        place="path",
    )

    _argument_group_name = "evaluation"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.pretrained_model_name_or_path, self.images_dir, self.watch]
        if sum(name is not None for name in given) != 1:
            raise ValueError("Give exactly one of pretrained_model_name_or_path, images_dir and watch.")
        of_a_model = self.search_sigmas or self.search_guidance or self.revision
        if self.pretrained_model_name_or_path is None and of_a_model:
            raise ValueError("search_sigmas, search_guidance and revision need --pretrained_model_name_or_path.")
        if self.keep_best is not None and self.watch is None:
            raise ValueError("keep_best needs --watch, which evaluates several checkpoints.")
        if self.images_dir is not None and (self.num_inference_steps or self.sigmas):
            raise ValueError("num_inference_steps and sigmas apply to models; leave them out with images_dir.")
        how = ("guidance_scale", "guidance_interval", "solver", "gamma")
        for name in how if self.images_dir is not None else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} applies to models; leave it out with images_dir.")
        if self.guidance_interval is not None and set(self.guidance_scale or [1]) == {1} and not self.search_guidance:
            raise ValueError("guidance_interval has no effect without a --guidance_scale other than 1.")
        if self.search_sigmas and len(self.guidance_scale or []) > 1:
            raise ValueError("search_sigmas searches at one guidance_scale, but several are given. Give one.")
        if self.search_sigmas and self.search_guidance:
            raise ValueError(
                "search_guidance and search_sigmas can't run together. Search the guidance first, then the levels with"
                " the --guidance_scale that it found."
            )
        if self.search_guidance and self.guidance_scale:
            raise ValueError("search_guidance finds the guidance_scale. Leave guidance_scale out.")
        if self.images_dir is not None and self.seed:
            raise ValueError("seed applies to models; leave it out with images_dir.")
        if self.search_samples != 2000 and self.search_sigmas is None and self.search_guidance is None:
            raise ValueError("search_samples has no effect without --search_sigmas or --search_guidance.")
        if self.feature_weights is not None and self.feature_extractor == "classifier":
            raise ValueError("feature_weights has no effect: the classifier is trained on the dataset.")
        if self.revision is not None and Path(self.pretrained_model_name_or_path).exists():
            raise ValueError(
                "revision has no effect on a local folder: only models on the Hub have revisions. Leave it out."
            )
        self.sigma_lists()

    def sigma_lists(self) -> list[list[float]]:
        """The lists of noise levels as numbers.

        Raises:
            ValueError: a word is not a comma-separated list of numbers.
        """
        lists = self.sigmas or []
        if len(lists) > 1 and not any("," in one for one in lists):
            raise ValueError(
                f"sigmas takes one word for each list. Write {','.join(lists)} for one list of these levels."
            )
        try:
            return [[float(sigma) for sigma in one.split(",")] for one in lists]
        except ValueError:
            raise ValueError(f"sigmas takes lists of numbers, such as 80,0.8; got {', '.join(lists)}.") from None

    def ways(self, *scales: float) -> list[dict[str, Any]]:
        """Keyword arguments of the pipeline for solver, gamma and guidance, one dictionary for each guidance scale.

        Args:
            scales: the guidance scales; by default those of the settings, or 1. Duplicates are left out.
        """
        common = {name: getattr(self, name) for name in ("solver", "gamma") if getattr(self, name) is not None}
        interval = {} if self.guidance_interval is None else {"guidance_interval": self.guidance_interval}
        wanted = dict.fromkeys(scales or self.guidance_scale or [1.0])
        return [common if scale == 1 else {**common, "guidance_scale": scale, **interval} for scale in wanted]

    @property
    def folder(self) -> Path:
        """The folder of the results: `output_dir` or its default."""
        if self.output_dir or self.watch:
            return Path(self.output_dir or self.watch)
        run = Path(self.pretrained_model_name_or_path or "").parent
        has_card = (run / RunFiles.FACTS).is_file() and self.search_sigmas is None
        return run if has_card else Path("runs/evaluation")

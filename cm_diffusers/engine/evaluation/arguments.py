"""Settings of an evaluation, beside those of the dataset."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm_diffusers.engine.files import RunFiles
from cm_diffusers.objectives.options import SOME_STEPS, Options, option


BETTER = {  # by its metric, whether of two models the better one has less or more
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
    pretrained_model_name_or_path: str | None = option(
        None,
        "Model to evaluate, a folder or a Hub id. Give exactly one of this, --images_dir and --watch.",
        place="path or Hub id",
    )
    images_dir: str | None = option(None, "Folder of images to evaluate.", place="path")
    watch: str | None = option(
        None, "Folder of a training run: each checkpoint is evaluated, until the run ends.", place="path"
    )
    revision: str | None = option(None, "Revision of the model on the Hub.")
    num_samples: int | None = option(None, "How many images. Default: 10,000, or all of images_dir.", SOME_STEPS)
    num_inference_steps: list[int] | None = option(
        None, "Numbers of steps, as 1 2 4. Default: the model's usual ones.", SOME_STEPS
    )
    sigmas: list[str] | None = option(None, "Lists of noise levels to sample at as well, as 80,0.8 80,5,0.5.")
    guidance_scale: list[float] | None = option(
        None,
        "Scales of classifier-free guidance, as 1 1.5 2, each for all steps and lists of levels; 1 is none.",
        "[0, 1e3]",
    )
    guidance_interval: list[float] | None = option(
        None, "Lowest and highest noise level at which there is guidance. Default: all levels.", "[0, inf]"
    )
    solver: str | None = option(
        None,
        "Solver of diffusion and of trajectory models. Default: the model's usual one.",
        choices=["gamma", "heun", "euler", "ddim", "sde", "sde_2m"],
    )
    gamma: float | None = option(
        None, "Share of new noise between a trajectory model's jumps. Default: the model's own.", "[0, 1]"
    )
    search_sigmas: int | None = option(
        None,
        "Find the best noise levels for this many steps, and save a copy of the model that takes them.",
        "[2, 10]",
    )
    search_guidance: int | None = option(
        None, "Find the best scale of guidance, 1 to 5, for this many steps, and measure it beside none.", SOME_STEPS
    )
    search_samples: int = option(
        2000, "Images per distance in these searches; their seeds are not those of the results.", SOME_STEPS
    )
    keep_best: str | None = option(
        None,
        "Of a watched run, keep the checkpoint that is best by this metric of the first number of steps, as a model in"
        " best/pipeline of the output folder.",
        choices=[*BETTER],
    )
    seed: int = option(0, "Image i is made from seed + i alone; classes take turns.", "[0, 1e18]")
    batch_size: int = option(250, "Images made at once by each process.", SOME_STEPS)
    feature_extractor: str | None = option(
        None,
        "inception (of FID), dinov2, classifier (a small one, trained on the labelled dataset), an image classifier's"
        " Hub id, or module:name of an nn.Module. Default: inception where its weights can be had, else classifier.",
        place="path or Hub id",
        words=("inception", "dinov2", "classifier"),
    )
    feature_weights: str | None = option(
        None, "The extractor's weights, a file or folder, instead of a download.", place="path or Hub id"
    )
    reference_cache: str = option("runs/references", "Folder that keeps the dataset's features.", place="path")
    output_dir: str | None = option(
        None,
        "Gets metrics.json and quality.png. Default: the folder of the run that made the model, else runs/evaluation.",
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
            raise ValueError("search_sigmas, search_guidance and revision are for --pretrained_model_name_or_path.")
        if self.keep_best is not None and self.watch is None:
            raise ValueError("keep_best is for --watch, as there is one model only.")
        if self.images_dir is not None and (self.num_inference_steps or self.sigmas):
            raise ValueError("num_inference_steps and sigmas are for models, and images_dir is given.")
        how = ("guidance_scale", "guidance_interval", "solver", "gamma")
        for name in how if self.images_dir is not None else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for models, and images_dir is given.")
        if self.guidance_interval is not None and set(self.guidance_scale or [1]) == {1} and not self.search_guidance:
            raise ValueError("guidance_interval has no effect without a --guidance_scale other than 1.")
        if self.search_sigmas and len(self.guidance_scale or []) > 1:
            raise ValueError("search_sigmas searches at one guidance_scale; give one.")
        if self.search_sigmas and self.search_guidance:
            raise ValueError(
                "search_guidance and search_sigmas go one after the other: search the guidance, then the levels with"
                " the --guidance_scale that was found."
            )
        if self.search_guidance and self.guidance_scale:
            raise ValueError("search_guidance finds the guidance_scale; leave that out.")
        if self.images_dir is not None and self.seed:
            raise ValueError("seed is for models, and images_dir is given.")
        if self.search_samples != 2000 and self.search_sigmas is None and self.search_guidance is None:
            raise ValueError("search_samples is for --search_sigmas and --search_guidance, and none is given.")
        if self.feature_weights is not None and self.feature_extractor == "classifier":
            raise ValueError("feature_weights has no effect: the classifier is trained on the dataset.")
        if self.revision is not None and Path(self.pretrained_model_name_or_path).exists():
            raise ValueError(
                "revision has no effect: revisions are those of a model on the Hub, and this is a folder."
            )
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

    def ways(self, *scales: float) -> list[dict[str, Any]]:
        """What a sampler is told beside its levels, for each scale of guidance; by default for those asked for."""
        common = {name: getattr(self, name) for name in ("solver", "gamma") if getattr(self, name) is not None}
        interval = {} if self.guidance_interval is None else {"guidance_interval": self.guidance_interval}
        wanted = dict.fromkeys(scales or self.guidance_scale or [1.0])
        return [common if scale == 1 else {**common, "guidance_scale": scale, **interval} for scale in wanted]

    @property
    def folder(self) -> Path:
        """Where the results go."""
        if self.output_dir or self.watch:
            return Path(self.output_dir or self.watch)
        run = Path(self.pretrained_model_name_or_path or "").parent
        has_card = (run / RunFiles.FACTS).is_file() and self.search_sigmas is None
        return run if has_card else Path("runs/evaluation")

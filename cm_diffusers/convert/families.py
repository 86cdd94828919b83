"""From a checkpoint of another project to a pipeline: which family it is, what it carries over, how it is sampled."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    ModelMixin,
)
from torch import Tensor

from cm_diffusers.convert.adm import build_stock_network
from cm_diffusers.convert.ctm import build_two_time_network
from cm_diffusers.convert.edm import build_network
from cm_diffusers.convert.reading import Module, flatten, read_checkpoint
from cm_diffusers.convert.small import build_raw_sigma_network, build_shuffle_network
from cm_diffusers.models import EDMUNet2DModel
from cm_diffusers.pipelines import ConsistencyPipeline, CTMPipeline, DenoisingPipeline, TrigFlowPipeline
from cm_diffusers.schedulers import CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler


FAMILIES = {
    "openai": "a consistency model (CD or CT) or EDM model of OpenAI's code: ADM, one time",
    "edm": "a diffusion model of EDM's code",
    "ect": "a consistency model of ECT's code",
    "cdm": "a consistent diffusion model of CDM's code",
    "ctm": "a consistency trajectory model of CTM's code: two times",
    "scm": "the sCM of MNIST or its diffusion model",
    "simo": "a consistency model of cloneofsimo's code",
}
SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
ECT_FLOOR = 0.003
PRECONDITIONINGS = {"EDMPrecond": "edm", "ECMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "none"}
VP_SETTINGS = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}


@dataclass(frozen=True)
class Options:
    """What a file may not tell. None stands for what is assumed then.

    Args:
        weights: "ema" or "online".
        family: a key of `FAMILIES` that the file has to be of.
        kind: "consistency" or "diffusion".
        num_head_channels: channels per attention head of ADM (64).
        image_size: side of the images (64; 28 and 32 for the small models).
        qkv_order: "new", or "legacy" for a network of guided diffusion's first code ("new").
        num_train_timesteps: levels of the grid of the training (40).
    """

    weights: str | None = None
    family: str | None = None
    kind: str | None = None
    num_head_channels: int | None = None
    image_size: int | None = None
    qkv_order: str | None = None
    num_train_timesteps: int | None = None


@dataclass
class Converted:
    """A converted checkpoint.

    Args:
        family: a key of `FAMILIES`.
        result: a pipeline; or a network, where there is no pipeline for its preconditioning.
        notes: what was found, assumed and left out.
        sampling: options of `training/sample.py` that sample it as its authors do.
    """

    family: str
    result: DiffusionPipeline | ModelMixin
    notes: list[str]
    sampling: str = ""


@dataclass
class Source:
    """The chosen weights of a checkpoint and what else it says of them."""

    path: Path
    tensors: dict[str, Tensor]
    module: Module | None
    loss: str
    options: Options
    notes: list[str] = field(default_factory=list)

    def setting(self, name: str, default: object) -> object:
        """An attribute of the pickled network, or `default`, as an assumption, where only weights are known."""
        if self.module is None:
            self.notes.append(f"assumed: {name} {default}, which weights alone don't tell")
            return default
        return self.module.state.get(name, default)

    def assumed(self, option: str, default: object, why: str = "which shapes don't tell") -> object:
        """What the user said, or else `default`, noted as an assumption."""
        value = getattr(self.options, option)
        if value is None:
            self.notes.append(f"assumed: --{option} {default}, {why}")
            return default
        return value


def convert_checkpoint(path: Path | str, options: Options = Options()) -> Converted:
    """Read the file `path` and convert it; nothing in it is run.

    Raises:
        ValueError: it can't be read safely, is of no known family or of another than was asked for, or its tensors are
            not exactly those of its family.
    """
    source = _choose(Path(path), read_checkpoint(path), options)
    family, build = _recognise(source)
    if options.family not in (None, family):
        raise ValueError(_other_family(path, family, options.family))
    result, sampling = build(source)
    return Converted(family, result, source.notes, sampling)


def _choose(path: Path, content: object, options: Options) -> Source:
    """The EMA or online weights of what a file holds."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no weights but a {type(content).__name__}.")
    loss = content.get("loss_fn")
    sets = {"ema": ("ema",), "online": ("net", "model", "state_dict")}
    found = {which: next((content[n] for n in names if n in content), None) for which, names in sets.items()}
    found = {which: value for which, value in found.items() if isinstance(value, (dict, Module))}
    if not found:
        if options.weights is not None:
            raise ValueError(
                f"{path} holds one set of weights, whose name says whether it is the EMA: leave out --{options.weights},"
                " and choose by the file."
            )
        value, note = content, "weights: the only ones in the file"
    else:
        which = options.weights or next(iter(found))
        if which not in found:
            raise ValueError(f"{path} holds no {which} weights, only {' and '.join(found)}.")
        value, note = found[which], f"weights: {which}"
    module = value if isinstance(value, Module) else None
    tensors = flatten(module) if module else {name: t for name, t in value.items() if isinstance(t, Tensor)}
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in tensors.items()}
    loss = loss.kind if isinstance(loss, Module) else ""
    return Source(path, tensors, module, loss, options, [note])


def _recognise(source: Source) -> tuple[str, Callable[[Source], tuple]]:
    """The family, by names of tensors and classes, and what builds it."""
    names = source.tensors.keys()
    if any(name.removeprefix("model.").startswith("enc.") for name in names):
        if any("map_layer0_s." in name for name in names):
            return "ctm", _ctm_of_edm
        kind = source.module.kind if source.module else ""
        if kind == "ECMPrecond" or not kind and source.options.kind == "consistency":
            return "ect", _edm
        return ("cdm" if source.loss == "MartingaleLoss" else "edm"), _edm
    if "time_embed.0.weight" in names and "input_blocks.0.0.weight" in names:
        return ("ctm", _ctm) if "time_embed_s.0.weight" in names else ("openai", _openai)
    if "init_conv.conv.weight" in names and "logvar_linear.weight" in names:
        return "scm", _scm
    if "time_downs.0.weight" in names and "last.weight" in names:
        return "simo", _simo
    known = "; ".join(f"{name} ({what})" for name, what in FAMILIES.items())
    some = ", ".join(list(names)[:4]) or "no tensors at all"
    raise ValueError(f"{source.path} is of no family known here: it holds {some}. Known are {known}.")


def _other_family(path: Path | str, found: str, asked: str) -> str:
    reason = ""
    if asked == "ctm" and found == "openai":
        reason = " It has no time_embed_s, so it can't be told where to jump to: CD and CT models are no CTM models."
    return f"{path} is not of the family {asked}. It is {FAMILIES[found]}: leave out --family, or give {found}.{reason}"


def _scheduler(sigma_min: float, sigma_max: float, sigma_data: float) -> EDMEulerScheduler:
    """EDM's sampler stays within what the network knows, and between 0.002 and 80."""
    low, high = max(SIGMA_MIN, sigma_min), min(SIGMA_MAX, sigma_max)
    return EDMEulerScheduler(sigma_min=low, sigma_max=high, sigma_data=sigma_data)


def _edm(source: Source) -> tuple[DiffusionPipeline | ModelMixin, str]:
    """Of EDM, ECT and CDM."""
    consistency = source.options.kind == "consistency"
    kind = source.module.kind if source.module else ("ECMPrecond" if consistency else "EDMPrecond")
    if source.module is None:
        source.notes.append(f"assumed: {kind}, which weights alone don't tell; another kind by --kind, or its .pkl")
    if kind not in PRECONDITIONINGS:
        raise ValueError(f"{source.path} has the preconditioning {kind}; known are {', '.join(PRECONDITIONINGS)}.")
    preconditioning = PRECONDITIONINGS[kind]
    wrong = [n for n, v in VP_SETTINGS.items() if preconditioning == "vp" and source.setting(n, v) != v]
    if wrong:
        raise ValueError(f"{source.path}: {wrong[0]} {source.setting(wrong[0], None)} is not {VP_SETTINGS[wrong[0]]}.")
    if source.tensors.pop("u", None) is not None:
        source.notes.append("left out: the table of levels u, which the network itself does not read")
    network = _edm_network(source, preconditioning)
    if preconditioning == "none":
        source.notes.append(
            "the network alone, called with the label M - 1 - j of iDDPM: no pipeline here has its levels;"
            " D = x - sigma F(x / sqrt(sigma^2 + 1), label), F of the first half of the channels"
        )
        return network, ""
    sigma_data = source.setting("sigma_data", SIGMA_DATA) if preconditioning == "edm" else 1.0
    if kind == "ECMPrecond":
        floor = source.setting("sigma_min", ECT_FLOOR)
        scheduler = MultistepConsistencyScheduler(
            sigma_min=floor, sigma_data=sigma_data, clip_denoised=False, renoise="full"
        )
        return ConsistencyPipeline(network, scheduler), "--sigmas 80 0.821"
    low, high = source.setting("sigma_min", 0), source.setting("sigma_max", float("inf"))
    return DenoisingPipeline(network, _scheduler(low, high, sigma_data)), "--num_inference_steps 18"


def _edm_network(source: Source, preconditioning: str) -> EDMUNet2DModel:
    """With the dropout of the file, which training goes on with."""
    config = {}
    if source.module is not None:
        model = (source.module.state.get("_modules") or {}).get("model")
        arguments = model.state.get("_init_kwargs") if isinstance(model, Module) else None
        known = arguments if isinstance(arguments, dict) else {}
        config = {name: float(known.get(name, 0.0)) for name in ("dropout", "label_dropout")}
    prefix = "model." if any(name.startswith("model.") for name in source.tensors) else ""
    return build_network(source.tensors, prefix, preconditioning, "a network of EDM's code", **config)


def _ctm_of_edm(source: Source) -> tuple[CTMPipeline, str]:
    source.notes.append(f"assumed: sigma_data {SIGMA_DATA}, sigma from {SIGMA_MIN} to {SIGMA_MAX}, as CTM's code has")
    steps = source.assumed("num_train_timesteps", 18, "as CTM's CIFAR-10 models have")
    scheduler = CTMScheduler(num_train_timesteps=steps, gamma_rule="official")
    return CTMPipeline(_edm_network(source, "edm"), scheduler), "--num_inference_steps 1"


def _adm_options(source: Source) -> dict:
    return {
        "head_dim": source.assumed("num_head_channels", 64),
        "image_size": source.assumed("image_size", 64),
        "qkv_order": source.assumed("qkv_order", "new", "as OpenAI's consistency models and CTM have"),
        "family": "a network of OpenAI's code",
    }


def _ctm(source: Source) -> tuple[CTMPipeline, str]:
    source.notes.append(f"assumed: sigma_data {SIGMA_DATA}, sigma from {SIGMA_MIN} to {SIGMA_MAX}, as CTM's code has")
    steps = source.assumed("num_train_timesteps", 40, "as CTM's ImageNet models have")
    network = build_two_time_network(source.tensors, **_adm_options(source))
    scheduler = CTMScheduler(num_train_timesteps=steps, gamma_rule="official")
    return CTMPipeline(network, scheduler), "--num_inference_steps 1"


def _openai(source: Source) -> tuple[DiffusionPipeline, str]:
    source.notes.append(f"assumed: sigma_data {SIGMA_DATA}, sigma from {SIGMA_MIN} to {SIGMA_MAX}, as OpenAI's code has")
    network = build_stock_network(source.tensors, **_adm_options(source))
    named = "diffusion" if source.path.name.startswith("edm") else "consistency"
    if source.assumed("kind", named, "by the file's name, as the networks are the same") == "diffusion":
        return DenoisingPipeline(network, _scheduler(SIGMA_MIN, SIGMA_MAX, SIGMA_DATA)), "--num_inference_steps 40"
    steps = source.assumed("num_train_timesteps", 40, "as CD has; CT on ImageNet 201, on LSUN 151")
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=steps)
    return ConsistencyModelPipeline(network, scheduler), "--num_inference_steps 1"


def _scm(source: Source) -> tuple[TrigFlowPipeline, str]:
    """Its images are in [-1/2, 1/2], ours in [-1, 1]; F is the same for data of any scale."""
    source.notes.append("left out: logvar_linear, the log-variance, which only training needs")
    source.notes.append("images twice as large as its own, in [-1, 1]: sigma_data 1 for 0.5, sigma_max 160 for 80")
    network = build_shuffle_network(source.tensors, source.assumed("image_size", 28), "the sCM of MNIST")
    named = "consistency" if "consistency" in source.path.name else "diffusion"
    kind = source.assumed("kind", named, "by the file's name, as the networks are the same")
    solver = "consistency" if kind == "consistency" else "heun"
    scheduler = TrigFlowScheduler(
        sigma_data=2 * SIGMA_DATA, sigma_max=2 * SIGMA_MAX, sigma_min=2 * SIGMA_MIN, solver=solver
    )
    return TrigFlowPipeline(network, scheduler), f"--num_inference_steps {2 if kind == 'consistency' else 18}"


def _simo(source: Source) -> tuple[ConsistencyPipeline, str]:
    network = build_raw_sigma_network(source.tensors, source.assumed("image_size", 32), "cloneofsimo's model")
    source.notes.append("its c_out is half of what it should be at sigma_data 0.5: the last layer is halved for it")
    scheduler = MultistepConsistencyScheduler(num_train_timesteps=150, clip_denoised=False)
    return ConsistencyPipeline(network, scheduler), "--sigmas 80 2"

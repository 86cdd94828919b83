"""A builder for each family: it makes the network, a scheduler equivalent to the original code, and the pipeline.

Each returns the result and the options of `training/sample.py` that sample it as its authors do.
"""

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    ModelMixin,
)

from cm_diffusers.convert.adm import build_stock_network
from cm_diffusers.convert.ctm import build_two_time_network
from cm_diffusers.convert.edm import build_network
from cm_diffusers.convert.published_networks import build_raw_sigma_network, build_shuffle_network
from cm_diffusers.convert.reading import Module
from cm_diffusers.convert.source import ForeignCheckpoint
from cm_diffusers.models import EDMUNet2DModel
from cm_diffusers.pipelines import ConsistencyPipeline, CTMPipeline, DenoisingPipeline, TrigFlowPipeline
from cm_diffusers.schedulers import CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler


SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5
ASSUMED_LEVELS = f"assumed: sigma_data {SIGMA_DATA}, sigma from {SIGMA_MIN} to {SIGMA_MAX}, as in {{}}'s code"
ECT_FLOOR = 0.003
PRECONDITIONINGS = {
    "EDMPrecond": "edm",
    "ECMPrecond": "edm",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "none",
}
VP_SETTINGS = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}


def _scheduler(sigma_min: float, sigma_max: float, sigma_data: float) -> EDMEulerScheduler:
    """EDM's sampler, within the noise levels that the network was trained on and within [0.002, 80]."""
    low, high = max(SIGMA_MIN, sigma_min), min(SIGMA_MAX, sigma_max)
    return EDMEulerScheduler(sigma_min=low, sigma_max=high, sigma_data=sigma_data)


def precond_of(source: ForeignCheckpoint) -> str:
    """Name of the preconditioning of `source` in EDM's code, such as "EDMPrecond".

    If the file holds weights alone, the kind of model (consistency or diffusion) decides.
    """
    if source.module is not None:
        return source.module.kind
    return "ECMPrecond" if source.options.kind == "consistency" else "EDMPrecond"


def edm(source: ForeignCheckpoint) -> tuple[DiffusionPipeline | ModelMixin, str]:
    """Build a model of EDM, ECT or CDM from `source`.

    Raises:
        ValueError: the preconditioning or one of its settings is unsupported.
    """
    precond = precond_of(source)
    if source.module is None:
        source.assumed("kind", "diffusion", "because weights alone don't show it")
    if precond not in PRECONDITIONINGS:
        raise ValueError(
            f"{source.path} has the unknown preconditioning {precond}; known are {', '.join(PRECONDITIONINGS)}."
        )
    preconditioning = PRECONDITIONINGS[precond]
    for name, value in VP_SETTINGS.items() if preconditioning == "vp" else ():
        if source.setting(name, value) != value:
            raise ValueError(f"{source.path} has {name} {source.setting(name, value)}; only {value} can be converted.")
    if preconditioning == "none":
        return _network_of_iddpm(source), ""
    network = _edm_network(source, preconditioning)
    # for VP and VE, EDM's F at sigma_data 1 follows from the predicted noise
    sigma_data = source.setting("sigma_data", SIGMA_DATA) if preconditioning == "edm" else 1.0
    if precond == "ECMPrecond":
        floor = source.setting("sigma_min", ECT_FLOOR)
        scheduler = MultistepConsistencyScheduler(
            sigma_min=floor, sigma_data=sigma_data, clip_denoised=False, renoise="full"
        )
        return ConsistencyPipeline(network, scheduler), "--sigmas 80 0.821"
    low, high = source.setting("sigma_min", 0.0), source.setting("sigma_max", float("inf"))
    return DenoisingPipeline(network, _scheduler(low, high, sigma_data)), "--num_inference_steps 18"


def _network_of_iddpm(source: ForeignCheckpoint) -> EDMUNet2DModel:
    """Build the network alone, because no pipeline here supports its table of noise levels u_j."""
    if source.tensors.pop("u", None) is not None:
        source.notes.append("left out: the table of noise levels u, which the network itself does not read")
    source.notes.append(
        "the network alone, without a pipeline: at the noise level u_j it takes the timestep 999 - j and"
        " x / sqrt(u_j^2 + 1); the first half of its output channels is the noise in x"
    )
    return _edm_network(source, "none")


def _edm_network(source: ForeignCheckpoint, preconditioning: str) -> EDMUNet2DModel:
    """Build an EDM network with the file's dropout, so that training can continue with it."""
    config = {}
    if source.module is not None:
        model = (source.module.state.get("_modules") or {}).get("model")
        arguments = model.state.get("_init_kwargs") if isinstance(model, Module) else None
        known = arguments if isinstance(arguments, dict) else {}
        config = {name: float(known.get(name, 0.0)) for name in ("dropout", "label_dropout")}
    prefix = "model." if any(name.startswith("model.") for name in source.tensors) else ""
    return build_network(source.tensors, prefix, preconditioning, "a network of EDM's code", **config)


def ctm_of_edm(source: ForeignCheckpoint) -> tuple[CTMPipeline, str]:
    """Build CTM's CIFAR-10 model, which extends EDM's code, from `source`."""
    source.notes.append(ASSUMED_LEVELS.format("CTM"))
    steps = source.assumed("num_train_timesteps", 18, "as in CTM's CIFAR-10 models")
    scheduler = CTMScheduler(num_train_timesteps=steps, gamma_rule="official")
    return CTMPipeline(_edm_network(source, "edm"), scheduler), "--num_inference_steps 1"


def _adm_options(source: ForeignCheckpoint) -> dict:
    return {
        "head_dim": source.assumed("num_head_channels", 64),
        "image_size": source.assumed("image_size", 64),
        "qkv_order": source.assumed("qkv_order", "new", "as in OpenAI's consistency models and CTM"),
        "family": "a network of OpenAI's code",
    }


def ctm(source: ForeignCheckpoint) -> tuple[CTMPipeline, str]:
    """Build CTM's ImageNet model, which extends OpenAI's code, from `source`."""
    source.notes.append(ASSUMED_LEVELS.format("CTM"))
    steps = source.assumed("num_train_timesteps", 40, "as in CTM's ImageNet models")
    network = build_two_time_network(source.tensors, **_adm_options(source))
    scheduler = CTMScheduler(num_train_timesteps=steps, gamma_rule="official")
    return CTMPipeline(network, scheduler), "--num_inference_steps 1"


def openai(source: ForeignCheckpoint) -> tuple[DiffusionPipeline, str]:
    """Build OpenAI's consistency model (CD or CT) or EDM teacher from `source`."""
    source.notes.append(ASSUMED_LEVELS.format("OpenAI"))
    network = build_stock_network(source.tensors, **_adm_options(source))
    named = "diffusion" if source.path.name.startswith("edm") else "consistency"
    if source.assumed("kind", named, "from the file's name, because the networks are the same") == "diffusion":
        return DenoisingPipeline(network, _scheduler(SIGMA_MIN, SIGMA_MAX, SIGMA_DATA)), "--num_inference_steps 40"
    steps = source.assumed("num_train_timesteps", 40, "as in CD; CT has 201 on ImageNet, 151 on LSUN")
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=steps)
    return ConsistencyModelPipeline(network, scheduler), "--num_inference_steps 1"


def scm(source: ForeignCheckpoint) -> tuple[TrigFlowPipeline, str]:
    """Build the sCM of MNIST, or its diffusion model, from `source`.

    The original images lie in [-1/2, 1/2], ours in [-1, 1]. F does not depend on the scale of the data.
    """
    source.notes.append("left out: logvar_linear, the log-variance, which only training needs")
    source.notes.append("images in [-1, 1] instead of [-1/2, 1/2]: sigma_data 1 instead of 0.5, sigma_max 160 not 80")
    network = build_shuffle_network(source.tensors, source.assumed("image_size", 28), "the sCM of MNIST")
    named = "consistency" if "consistency" in source.path.name else "diffusion"
    kind = source.assumed("kind", named, "from the file's name, because the networks are the same")
    solver = "consistency" if kind == "consistency" else "heun"
    scheduler = TrigFlowScheduler(
        sigma_data=2 * SIGMA_DATA, sigma_max=2 * SIGMA_MAX, sigma_min=2 * SIGMA_MIN, solver=solver
    )
    return TrigFlowPipeline(network, scheduler), f"--num_inference_steps {2 if kind == 'consistency' else 18}"


def simo(source: ForeignCheckpoint) -> tuple[ConsistencyPipeline, str]:
    """Build cloneofsimo's consistency model from `source`."""
    network = build_raw_sigma_network(source.tensors, source.assumed("image_size", 32), "cloneofsimo's model")
    source.notes.append("the original c_out is half the right value at sigma_data 0.5: the last layer was halved")
    scheduler = MultistepConsistencyScheduler(num_train_timesteps=150, clip_denoised=False)
    return ConsistencyPipeline(network, scheduler), "--sigmas 80 2"

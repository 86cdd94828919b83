"""diffusers models as denoisers in sigma, against closed forms and the stock schedulers' steps."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeliosScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.solvers import euler_step, heun_step
from cm_diffusers.engine.config import ModelArguments
from cm_diffusers.engine.saved.start import load_start, load_teacher
from cm_diffusers.engine.saved.stock import is_few_step, read_scheduler, read_stock, without_variance
from cm_diffusers.objectives import ECT
from cm_diffusers.sampling import load_pipeline
from tests.helpers.stock_pipelines import COSINE, PIPELINES, ZERO_SNR, dit, save, unet


# --- the closed form on a mixture of Gaussians with a known score


CENTRES, SPREAD = torch.tensor([-0.6, 0.1, 0.7], dtype=torch.float64), 0.2
SCHEDULES = {
    "linear": {},
    "scaled linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": COSINE,
    "trained": {"trained_betas": np.linspace(2e-4, 0.03, 500), "num_train_timesteps": 500},
    "zero snr": ZERO_SNR,
}


def mixture(x, sigma):
    """E[x0 | x0 + sigma noise = x] for images of independent pixels, each a mixture of three Gaussians."""
    sigma = torch.as_tensor(sigma).double().reshape(-1, 1, 1, 1, 1)
    x, variance = x.double()[..., None], SPREAD**2 + sigma**2
    weights = (-((x - CENTRES) ** 2) / (2 * variance)).softmax(-1)
    return (weights * (CENTRES + SPREAD**2 / variance * (x - CENTRES))).sum(-1)


def exact(prediction, alpha, std, x_t):
    """The output of a perfect network with this prediction for x_t = alpha x0 + std noise."""
    alpha, std = (v.reshape(-1, 1, 1, 1) for v in (alpha, std))
    x0 = mixture(x_t / alpha, std.flatten() / alpha.flatten())
    noise = (x_t.double() - alpha * x0) / std
    return {"sample": x0, "epsilon": noise, "v_prediction": alpha * noise - std * x0, "flow": noise - x0}[prediction]


def vp_network(scheduler):
    """A perfect network for fractional times between the entries of the scheduler's table."""
    abar = scheduler.alphas_cumprod.double().numpy()
    angles = np.arctan2(np.sqrt(1 - abar), np.sqrt(abar))

    def network(x, t, class_labels=None):
        angle = torch.from_numpy(np.interp(t.double().numpy(), np.arange(len(angles)), angles))
        sample = exact(scheduler.config.prediction_type, angle.cos(), angle.sin(), x)
        return SimpleNamespace(sample=sample.to(x.dtype))

    return network


def noised(levels, dtype=torch.float64):
    """Noisy data (B, 1, 4, 4) at the VE noise levels `levels` (B,)."""
    centre = CENTRES[torch.randint(3, (len(levels), 1, 4, 4))]
    x = centre + SPREAD * torch.randn(centre.shape) + levels.reshape(-1, 1, 1, 1) * torch.randn(centre.shape)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_perfect_vp_network_gives_the_closed_form(schedule, prediction, dtype):
    scheduler = DDPMScheduler(prediction_type=prediction, **schedule)
    spec = read_scheduler(scheduler)
    low = spec.process.sigma(torch.zeros(1, dtype=torch.float64)).item()
    levels = torch.logspace(math.log10(low), math.log10(spec.sigma_max), 40, dtype=torch.float64)
    x = noised(levels, dtype)
    denoised = spec.denoiser(vp_network(scheduler))(x, levels.to(dtype))
    assert denoised.dtype == dtype
    torch.testing.assert_close(denoised.double(), mixture(x, levels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_at_the_scheduler_s_levels_the_network_is_told_its_integers(schedule):
    scheduler, told = DDPMScheduler(**schedule), []
    abar = scheduler.alphas_cumprod.double()
    abar = abar[abar > 0]
    spec = read_scheduler(scheduler)

    def network(x, t, class_labels=None):
        told.append(t)
        return SimpleNamespace(sample=x)

    spec.denoiser(network)(torch.zeros(len(abar), 1, 1, 1).double(), ((1 - abar) / abar).sqrt())
    torch.testing.assert_close(told[0], torch.arange(len(abar)).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_a_perfect_edm_network_gives_the_closed_form(cls, prediction):
    scheduler = cls(sigma_data=0.6, prediction_type=prediction)
    levels = torch.logspace(-2.5, 1.9, 40, dtype=torch.float64)

    def network(c_in_x, t, class_labels=None):
        sigma = (4 * t).exp().reshape(-1, 1, 1, 1)
        x = c_in_x * (sigma**2 + 0.36).sqrt()
        F = (mixture(x, sigma.flatten()) - 0.36 / (sigma**2 + 0.36) * x) / (sigma * 0.6 / (sigma**2 + 0.36).sqrt())
        return SimpleNamespace(sample=F)  # loading already turns the sign of a "v_prediction" network

    x = noised(levels)
    denoiser = read_scheduler(scheduler).denoiser(network)
    assert isinstance(denoiser, EDMDenoiser)
    torch.testing.assert_close(denoiser(x, levels), mixture(x, levels), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1000, 500])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: FlowMatchEulerDiscreteScheduler(n),
        lambda n: FlowMatchEulerDiscreteScheduler(n, shift=3.0),
        lambda n: DPMSolverMultistepScheduler(n, prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_a_perfect_flow_network_gives_the_closed_form(make, steps):
    levels = torch.logspace(-3, 1.9, 40, dtype=torch.float64)

    def network(x, t, class_labels=None):
        return SimpleNamespace(sample=exact("flow", 1 - t / steps, t / steps, x))

    x = noised(levels)
    denoised = read_scheduler(make(steps)).denoiser(network)(x, levels)
    torch.testing.assert_close(denoised, mixture(x, levels), rtol=0, atol=1e-4)


def test_beyond_a_table_s_highest_level_samples_are_shrunk_onto_it():
    scheduler = DDPMScheduler(**SCHEDULES["scaled linear"])
    spec = read_scheduler(scheduler)
    assert spec.sigma_max == spec.process.sigma_max == pytest.approx(14.61, abs=0.01)
    denoiser, x = spec.denoiser(vp_network(scheduler)), 100 * torch.randn(3, 1, 4, 4).double()
    top = torch.full((3,), spec.sigma_max, dtype=torch.float64)
    above = denoiser(x, torch.full((3,), 100.0, dtype=torch.float64))
    torch.testing.assert_close(above, denoiser(x * spec.sigma_max / 100, top))
    assert above.abs().max() < 3


# --- the steps of the stock schedulers


PAIRS = [("linear", "epsilon"), ("scaled linear", "sample"), ("cosine", "v_prediction"), ("trained", "epsilon")]
EVERY_PAIR = pytest.mark.parametrize("schedule, prediction", [*PAIRS, ("zero snr", "v_prediction")])


def same(ours, theirs):
    """Assert equality to 1e-5 of the sample's norm."""
    error = torch.linalg.vector_norm(ours.double() - theirs.double()) / torch.linalg.vector_norm(theirs.double())
    assert error < 1e-5, error


def both(folder, pipeline):
    """The pipeline saved and loaded by diffusers, and our teacher from the same folder, with float64 networks."""
    pipeline.save_pretrained(folder)
    stock, teacher = type(pipeline).from_pretrained(folder), load_teacher(str(folder), ModelArguments())
    stock.unet.double()  # the comparison excludes the network's rounding
    teacher.network.double()
    return stock, teacher


def level(sigma, n=3):
    return torch.full((n,), float(sigma), dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("ends_at_one", [True, False])
@EVERY_PAIR
def test_ddim_steps(schedule, prediction, ends_at_one, tmp_path):
    config = {**SCHEDULES[schedule], "prediction_type": prediction, "clip_sample": False}
    config["set_alpha_to_one"] = ends_at_one
    stock, teacher = both(tmp_path, DDPMPipeline(unet(), DDIMScheduler(**config, steps_offset=1)))
    scheduler, x = stock.scheduler, torch.randn(3, 1, 8, 8).double()
    scheduler.set_timesteps(5)
    ends = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), scheduler.final_alpha_cumprod.item()]
    for t, abar, following in zip(scheduler.timesteps, ends, ends[1:]):
        sigma, sigma_next = (math.sqrt(1 / a - 1) for a in (abar, following))
        theirs = scheduler.step(stock.unet(x, t).sample, t, x).prev_sample
        ours = euler_step(teacher.denoiser, x / math.sqrt(abar), level(sigma), level(sigma_next))
        same(ours * math.sqrt(following), theirs)
        x = theirs


@torch.no_grad()
@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, HeunDiscreteScheduler])
@EVERY_PAIR
def test_euler_and_heun_steps(schedule, prediction, cls, tmp_path):
    if cls is HeunDiscreteScheduler and (prediction == "sample" or schedule == "zero snr"):
        pytest.skip("diffusers has not implemented it")
    config = {**SCHEDULES[schedule], "prediction_type": prediction, "timestep_spacing": "leading", "steps_offset": 1}
    stock, teacher = both(tmp_path, DDPMPipeline(unet(), cls(**config)))
    scheduler, x = stock.scheduler, torch.randn(3, 1, 8, 8).double()
    scheduler.set_timesteps(5)
    x = x * scheduler.init_noise_sigma
    solver, steps = heun_step if scheduler.order == 2 else euler_step, 0
    for t in scheduler.timesteps:
        if scheduler.order == 1 or scheduler.state_in_first_order:
            begin, (sigma, sigma_next), steps = x, scheduler_levels(scheduler, steps), steps + 1
        x = scheduler.step(stock.unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
        if scheduler.order == 1 or scheduler.state_in_first_order:
            same(solver(teacher.denoiser, begin, level(sigma), level(sigma_next)), x)
    assert steps == 5


def scheduler_levels(scheduler, i):
    """The levels at the start and end of step `i`; Heun's list has the inner levels twice."""
    sigmas = scheduler.sigmas
    if scheduler.order == 2:
        sigmas = torch.cat([sigmas[:1], sigmas[1::2]])
    return sigmas[i].item(), sigmas[i + 1].item()


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_euler_steps(prediction, tmp_path):
    scheduler = EDMEulerScheduler(sigma_data=0.6, prediction_type=prediction)
    stock, teacher = both(tmp_path, DDPMPipeline(unet(), scheduler))
    scheduler, x = stock.scheduler, 80 * torch.randn(3, 1, 8, 8).double()
    scheduler.set_timesteps(6)
    for i, t in enumerate(scheduler.timesteps):
        now, then = scheduler.sigmas[i : i + 2]
        ours = euler_step(teacher.denoiser, x, level(now), level(then))
        x = scheduler.step(stock.unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
        same(ours, x)


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler_steps(shift, tmp_path):
    stock, teacher = both(tmp_path, DDPMPipeline(unet(), FlowMatchEulerDiscreteScheduler(shift=shift)))
    scheduler, x = stock.scheduler, torch.randn(3, 1, 8, 8).double()
    scheduler.set_timesteps(6)
    for i, t in enumerate(scheduler.timesteps):
        now, then = scheduler.sigmas[i : i + 2].double()
        following = scheduler.step(stock.unet(x, t).sample, t, x).prev_sample.double()
        if now < 1:  # pure noise has no level in VE
            sigma, sigma_next = now / (1 - now), then / (1 - then)
            ours = euler_step(teacher.denoiser, x / (1 - now), level(sigma), level(sigma_next))
            same(ours * (1 - then), following)
        x = following


# --- read, printed and refused settings


LINES = {
    "epsilon": "UNet2DModel, 0.0 M parameters, predicts epsilon on a linear VP schedule of 1000 steps, sigma 0.01 to"
    " 157, unconditional, 1 x 8 x 8 pixels",
    "v": "predicts v_prediction on a squaredcos_cap_v2 VP schedule of 1000 steps, sigma 0.0064 to 2.03e+04, 10 cl",
    "v, zero snr": "on a scaled_linear zero-SNR VP schedule of 1000 steps, sigma 0.029 to infinity, unconditional",
    "sample": "predicts sample on",
    "edm": "predicts EDM's F, time label quarter_log_sigma, sigma_data 0.6, unconditional",
    "edm, v": "predicts EDM's F, time label quarter_log_sigma, sigma_data 0.5",
    "flow": "predicts the velocity of linear flow, time input 1000 times the flow time, 10 classes, 1 x 8 x 8 pixels",
    "dit": "DiTTransformer2DModel, 0.0 M parameters, predicts epsilon on a linear VP schedule of 1000 steps, sigma"
    " 0.01 to 157, 10 classes and a null class, 4 x 4 x 4 latents of AutoencoderKL",
    "ldm": "unconditional, 3 x 4 x 4 latents of VQModel",
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_line_says_what_was_found(kind, tmp_path):
    teacher = load_teacher(str(save(kind, tmp_path)), ModelArguments())
    assert LINES[kind] in str(teacher)
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_student_but_that_of_clean_images_is_the_identity_without_noise(kind, tmp_path):
    teacher = load_teacher(str(save(kind, tmp_path)), ModelArguments())
    labels = torch.zeros(2, dtype=torch.long) if teacher.num_classes else None
    x = torch.randn(2, *teacher.sample_shape)
    same = torch.equal(teacher.denoiser(x, torch.zeros(2), of_classes(labels)), x)
    assert same == (kind != "sample")


@pytest.mark.parametrize("make", [unet, dit])
@torch.no_grad()
def test_a_learned_variance_is_cut_off(make):
    """The kept channels are the first half, up to rounding."""
    if make is dit:
        network, x = dit(), torch.randn(2, 4, 4, 4)
        call = {"timestep": torch.tensor([3.0, 500.0]), "class_labels": torch.tensor([1, 2])}
    else:
        network, x = unet(out_channels=2), torch.randn(2, 1, 8, 8)
        call = {"timestep": torch.tensor([3.0, 500.0])}
    whole, half = network(x, **call).sample, without_variance(network)
    assert half.config.out_channels == x.shape[1] and whole.shape[1] == 2 * x.shape[1]
    torch.testing.assert_close(half(x, **call).sample, whole[:, : x.shape[1]], rtol=1e-6, atol=1e-6)


def refused(pipeline, folder, message):
    pipeline.save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        load_teacher(str(folder), ModelArguments())


def changed(scheduler, **config):
    """A scheduler with config values that its class would not accept."""
    scheduler.register_to_config(**config)
    return scheduler


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: DDPMPipeline(unet(), changed(DDPMScheduler(), prediction_type="score")),
            "epsilon, v_prediction, sample",
        ),
        (
            lambda: DDPMPipeline(unet(out_channels=3), DDPMScheduler()),
            "3 output channels for 1 .* as many, or twice as many",
        ),
        (
            lambda: DDPMPipeline(unet(time_embedding_type="learned", num_train_timesteps=1000), DDPMScheduler()),
            "time_embedding_type 'positional'",
        ),
        (
            lambda: DDPMPipeline(unet(), HeunDiscreteScheduler(beta_schedule="exp")),
            "one of linear.*it is 'exp'",
        ),
        (
            lambda: DDPMPipeline(
                unet(), EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
            ),
            "timestep_type .* must be 'discrete'",
        ),
        (lambda: DDPMPipeline(unet(), FlowMatchEulerDiscreteScheduler(invert_sigmas=True)), "invert_sigmas"),
    ],
)
def test_what_can_t_be_read_is_refused_with_what_can(make, message, tmp_path):
    refused(make(), tmp_path, message)


@pytest.mark.parametrize(
    "scheduler",
    [LCMScheduler, TCDScheduler, FlowMatchLCMScheduler, CMStochasticIterativeScheduler, SCMScheduler],
    ids=lambda cls: cls.__name__,
)
def test_what_jumps_to_clean_data_is_no_teacher_and_may_be_where_a_student_starts(scheduler, tmp_path):
    DDPMPipeline(unet(), scheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"must be a diffusion model.*consistency model, as its {scheduler.__name__}"):
        load_teacher(str(tmp_path), ModelArguments())
    if scheduler in (LCMScheduler, TCDScheduler):
        assert read_stock(DDPMPipeline(unet(), scheduler())).spec.prediction == "epsilon"


def test_a_class_made_from_the_scheduler_of_a_consistency_model_is_one():
    assert is_few_step(type("Shifted", (LCMScheduler,), {})()) and not is_few_step(DDIMScheduler())


class Halved(DDPMScheduler):
    """A DDPM scheduler with its own levels, which no setting shows."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.alphas_cumprod = 0.5 + 0.5 * self.alphas_cumprod


class FlowMatchShiftedTwice(FlowMatchEulerDiscreteScheduler):
    """A scheduler whose sigmas are shifted and whose timesteps are not."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.sigmas = 3 * self.sigmas / (1 + 2 * self.sigmas)


@pytest.mark.parametrize(
    "scheduler, theirs, ours",
    [
        (CogVideoXDDIMScheduler(), "0.05052 at time 0", "0.02917"),  # its snr_shift_scale
        (CogVideoXDPMScheduler(snr_shift_scale=1.2), "0.03195 at time 0", "0.02917"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "0.999 at time 999", "157.4"),
        (EulerDiscreteScheduler(prediction_type="flow_prediction"), "157.4 at time 999", "0.999"),
        (Halved(), "0.007072 at time 0", "0.01"),
        (FlowMatchShiftedTwice(), "0.9\\d* at time 8", "0.8"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_levels_that_are_not_those_of_the_settings_are_refused_with_both(scheduler, theirs, ours):
    with pytest.raises(ValueError, match=f"its {type(scheduler).__name__} has the noise level {theirs}.* give {ours}"):
        read_scheduler(scheduler)


def test_a_scheduler_without_levels_for_a_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="HeliosScheduler gives no noise levels for ten steps"):
        read_scheduler(HeliosScheduler())


SAMPLERS = {
    DDIMScheduler: {"timestep_spacing": "trailing", "steps_offset": 1},
    DPMSolverMultistepScheduler: {"use_karras_sigmas": True},
    EulerDiscreteScheduler: {"use_karras_sigmas": True, "timestep_spacing": "linspace"},
    HeunDiscreteScheduler: {"use_exponential_sigmas": True},
    KDPM2DiscreteScheduler: {"timestep_spacing": "trailing"},
    PNDMScheduler: {"skip_prk_steps": True},
    UniPCMultistepScheduler: {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    FlowMatchEulerDiscreteScheduler: {"use_dynamic_shifting": True},
    FlowMatchHeunDiscreteScheduler: {"shift": 5.0},
}


@pytest.mark.parametrize("cls", SAMPLERS, ids=lambda cls: cls.__name__)
def test_settings_that_only_choose_among_the_levels_are_no_trouble(cls):
    plain = {key: value for key, value in SAMPLERS[cls].items() if key in ("prediction_type", "use_flow_sigmas")}
    assert read_scheduler(cls(**SAMPLERS[cls])) == read_scheduler(cls(**plain))


def test_a_dit_that_older_diffusers_saved_is_read(tmp_path):
    """facebook/DiT-XL-2-256, for example, has the class's former name."""
    save("dit", tmp_path)
    index, config = tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"
    for path in (index, config):
        path.write_text(path.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert str(load_teacher(str(tmp_path), ModelArguments())).startswith("DiTTransformer2DModel, ")


def test_a_text_conditional_pipeline_is_refused_with_the_reason(tmp_path):
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}'
    )
    with pytest.raises(ValueError, match="conditioned on text; this version reads .*DDPMPipeline, DDIMPipeline"):
        load_teacher(str(tmp_path), ModelArguments())
    for load in (load_pipeline, lambda name: load_start(ModelArguments(pretrained_model_name_or_path=name), ECT)):
        with pytest.raises(ValueError, match="with diffusers itself, .* to distil one, give it as --pretrained_teach"):
            load(str(tmp_path))

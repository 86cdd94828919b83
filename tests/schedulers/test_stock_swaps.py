"""`from_config` of every diffusers scheduler: equal to diffusers' few-step schedulers in pipelines, or refused."""

import inspect
import math
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    SchedulerMixin,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    TCDScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from cm_diffusers import ConsistencyPipeline, CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler
from tests.helpers.breadth import narrowed
from tests.helpers.stock_pipelines import unet
from tests.helpers.stock_text_pipelines import IMAGE_TO_IMAGE, SIZE, TEXT_TO_IMAGE, UNSAFE, image


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ABAR = DDPMScheduler(**BETAS).alphas_cumprod.double()
SD, V, ZERO_SNR = {**BETAS, "steps_offset": 1}, {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}
DDIM = {**SD, "clip_sample": False}
# by model and scheduler: the pipeline, and the scheduler to replace
EQUAL = {
    "SD 1.x, LCM": ("sd", LCMScheduler(**SD)),
    "SD 1.x, TCD": ("sd", TCDScheduler(**SD)),
    "SD 1.x, DDIM": ("sd", DDIMScheduler(**DDIM, set_alpha_to_one=False)),
    "SD 1.x, PNDM": ("sd", PNDMScheduler(**SD, skip_prk_steps=True)),
    "SD 1.x, DPM++ 2M Karras": ("sd", DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)),
    "SD 2.x, DDIM, v": ("sd", DDIMScheduler(**DDIM, **V)),
    "SD 2.x, DDIM, v, zero SNR": ("sd", DDIMScheduler(**DDIM, **V, **ZERO_SNR, timestep_spacing="trailing")),
    "SDXL, Euler": ("sdxl", EulerDiscreteScheduler(**SD, timestep_spacing="leading")),
    "SDXL, Euler ancestral": ("sdxl", EulerAncestralDiscreteScheduler(**SD)),
    "SDXL, Heun": ("sdxl", HeunDiscreteScheduler(**SD)),
    "SDXL, Euler, v, zero SNR": ("sdxl", EulerDiscreteScheduler(**SD, **V, **ZERO_SNR)),
    "SDXL, UniPC, x0": ("sdxl", UniPCMultistepScheduler(**SD, prediction_type="sample")),
    "LCM, LCM": ("lcm", LCMScheduler(**SD, original_inference_steps=40)),
    "SD3, FlowMatchEuler, shift 3": ("sd3", FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "SD3, FlowMatchEuler, dynamic shift": ("sd3", FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    "SD3, FlowMatchHeun, shift 3": ("sd3", FlowMatchHeunDiscreteScheduler(shift=3.0)),
    "SD3, FlowMatchLCM, Karras": ("sd3", FlowMatchLCMScheduler(shift=3.0, use_karras_sigmas=True)),
}
every_swap = pytest.mark.parametrize("swap", EQUAL)
TOLERANCE = 5e-6  # relative to the largest latent, for float32 rounding; the largest measured error was 1.1e-6
PIPELINES = {}


def named(scheduler):
    """The scheduler's config, as in a loaded scheduler."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def ours(scheduler, **changes):
    return MultistepConsistencyScheduler.from_config(named(scheduler), **changes)


def theirs(scheduler):
    """The stock few-step scheduler with the same settings, which it must not take for another class's defaults."""
    kind = FlowMatchLCMScheduler if type(scheduler).__name__.startswith("FlowMatch") else LCMScheduler
    return kind.from_config({**named(scheduler), "_use_default_values": []})


def pipeline(kind):
    if kind not in PIPELINES:
        PIPELINES[kind] = TEXT_TO_IMAGE[kind]()
        PIPELINES[kind][0].set_progress_bar_config(disable=True)
    return PIPELINES[kind]


def on_images(kind):
    given = UNSAFE if kind in ("sd", "lcm") else {}
    pipe = IMAGE_TO_IMAGE[kind](**pipeline(kind)[0].components | given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, scheduler, seed=3, **call):
    pipe.scheduler = scheduler
    torch.manual_seed(seed)  # SD3's pipeline passes no generator to steps
    call = {"output_type": "latent", "generator": torch.Generator().manual_seed(seed), **call}
    return pipe(**call).images


def assert_equal(images, expected):
    assert expected.isfinite().all() and expected.std() > 0.05
    torch.testing.assert_close(images, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


# --- equal, in unchanged pipelines


@every_swap
@pytest.mark.parametrize("n", [1, 4, 7])
def test_a_pipeline_makes_the_images_of_the_stock_few_step_scheduler(swap, n):
    kind, scheduler = EQUAL[swap]
    pipe, call = pipeline(kind)
    call = {**call, "num_inference_steps": n, "height": SIZE, "width": SIZE}
    assert_equal(sample(pipe, ours(scheduler), **call), sample(pipe, theirs(scheduler), **call))


@every_swap
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_so_does_one_that_begins_with_an_image(swap, strength):
    kind, scheduler = EQUAL[swap]
    call = {**pipeline(kind)[1], "image": image(), "strength": strength, "num_inference_steps": 4}
    images = [sample(on_images(kind), one(scheduler), **call) for one in (ours, theirs)]
    assert_equal(*images)


@pytest.mark.parametrize("swap", ["SD 1.x, LCM", "SDXL, Euler", "SDXL, Euler, v, zero SNR"])
@pytest.mark.parametrize("times", [[999, 640, 259, 19], [700, 1], [500, 0]])
def test_given_timesteps_and_their_sigmas_are_the_same_levels(swap, times):
    """LCM's c_skip and c_out matter at the last times, where they differ by 0.003 from 0 and 1, and reach 1 and 0."""
    kind, scheduler = EQUAL[swap]
    pipe, call = pipeline(kind)
    call = {**call, "num_inference_steps": None, "height": SIZE, "width": SIZE}
    expected = sample(pipe, theirs(scheduler), timesteps=times, **call)
    assert_equal(sample(pipe, ours(scheduler), timesteps=times, **call), expected)
    abar = theirs(scheduler).alphas_cumprod.double()[times]
    sigmas = ((1 - abar) / abar).sqrt().tolist()
    assert_equal(sample(pipe, ours(scheduler), sigmas=sigmas, **call), expected)


@pytest.mark.parametrize("swap", [name for name in EQUAL if name.startswith("SD3")])
def test_sigmas_for_flow_are_flow_times_before_the_shift(swap):
    pipe, call = pipeline("sd3")
    call = {**call, "height": SIZE, "width": SIZE, "sigmas": [1.0, 0.6, 0.2]}
    images = [sample(pipe, one(EQUAL[swap][1]), **call) for one in (ours, theirs)]
    assert_equal(*images)


@pytest.mark.parametrize("original", [20, 100])
@pytest.mark.parametrize("given", [{"num_inference_steps": 4}, {"timesteps": [900, 500, 300, 100]}])
def test_the_pipeline_of_lcm_may_choose_among_other_times_and_trim_them(original, given):
    scheduler, call = EQUAL["LCM, LCM"][1], {**pipeline("lcm")[1], **given, "original_inference_steps": original}
    if "timesteps" not in given:
        shape = {"height": SIZE, "width": SIZE}
        images = [sample(pipeline("lcm")[0], one(scheduler), **call, **shape) for one in (ours, theirs)]
        assert_equal(*images)
    images = [sample(on_images("lcm"), one(scheduler), **call, image=image(), strength=0.5) for one in (ours, theirs)]
    assert_equal(*images)


def test_the_refiner_of_sdxl_goes_on_where_the_base_ends():
    pipe, call = pipeline("sdxl")
    refiner, images = on_images("sdxl"), []
    assert isinstance(refiner, StableDiffusionXLImg2ImgPipeline)
    for one in (ours, theirs):
        scheduler = one(EQUAL["SDXL, Euler"][1])
        shared = {**call, "num_inference_steps": 5}
        base = sample(pipe, scheduler, **shared, denoising_end=0.7, height=SIZE, width=SIZE)
        images += [base, sample(refiner, scheduler, **shared, denoising_start=0.7, image=base)]
    assert_equal(images[0], images[2])
    assert_equal(images[1], images[3])


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(strength):
    pipe, call = pipeline("sd")
    pipe = StableDiffusionInpaintPipeline(**pipe.components | UNSAFE)
    pipe.set_progress_bar_config(disable=True)
    mask = (torch.arange(SIZE) < SIZE // 2).float().expand(1, 1, SIZE, SIZE)
    call = {**call, "image": image(), "mask_image": mask, "height": SIZE, "width": SIZE, "strength": strength}
    images = [sample(pipe, one(EQUAL["SD 1.x, DDIM"][1]), **call, num_inference_steps=5) for one in (ours, theirs)]
    assert_equal(*images)


def test_a_model_of_pixels_is_clipped_as_its_scheduler_says():
    images = []
    for one in (ours, theirs):
        pipe = DDPMPipeline(unet(), one(DDPMScheduler()))  # linear betas, clip_sample
        assert pipe.scheduler.config.get("clip_denoised", pipe.scheduler.config.clip_sample) is True
        pipe.set_progress_bar_config(disable=True)
        images.append(torch.from_numpy(sample(pipe, pipe.scheduler, num_inference_steps=4, output_type="np")))
    assert_equal(*images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("swap", ["SD 1.x, LCM", "SD3, FlowMatchEuler, shift 3"])
def test_half_precision_draws_the_same_noise(swap, dtype):
    """Ours computes in float32 in between, so the two differ by the dtype's rounding."""
    scheduler, results = EQUAL[swap][1], []
    for one in (ours(scheduler), theirs(scheduler)):
        one.set_timesteps(2)
        x, output = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        results.append(one.step(output, one.timesteps[0], x, generator=torch.Generator().manual_seed(1)).prev_sample)
    torch.testing.assert_close(*results, rtol=0.02, atol=0.1)
    assert results[0].dtype == results[1].dtype == dtype


# --- mapped: closed forms


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_step_in_closed_form_on_a_table_of_betas(prediction):
    scheduler = ours(DDIMScheduler(**DDIM, prediction_type=prediction))
    scheduler.set_timesteps(timesteps=[700, 2])
    assert scheduler.timesteps.tolist() == [700, 2] and scheduler.timesteps.dtype == torch.int64
    x, output = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    assert scheduler.scale_model_input(x, 700) is x and scheduler.init_noise_sigma == 1
    step = scheduler.step(output, scheduler.timesteps[0], x, torch.Generator().manual_seed(0))
    alpha, std = ABAR[700].sqrt(), (1 - ABAR[700]).sqrt()
    clean = {"epsilon": (x - std * output) / alpha, "v_prediction": alpha * x - std * output, "sample": output}
    c_skip, c_out = 0.25 / (7000**2 + 0.25), 7000 / math.sqrt(7000**2 + 0.25)
    denoised = c_out * clean[prediction] + c_skip * x
    torch.testing.assert_close(step.pred_original_sample, denoised, rtol=1e-12, atol=1e-12)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = ABAR[2].sqrt() * denoised + (1 - ABAR[2]).sqrt() * noise
    torch.testing.assert_close(step.prev_sample, expected, rtol=1e-12, atol=1e-12)
    last = scheduler.step(output, scheduler.timesteps[1], x)
    assert last.prev_sample is last.pred_original_sample or last.prev_sample.equal(last.pred_original_sample)


def test_a_step_in_closed_form_of_flow():
    scheduler = ours(FlowMatchEulerDiscreteScheduler(shift=3.0))
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.timesteps.tolist() == [1000, 750]  # 3 t / (1 + 2 t)
    assert scheduler.sigmas.tolist() == [math.inf, 3, 0]
    x, output = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    step = scheduler.step(output, scheduler.timesteps[0], x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(step.pred_original_sample, x - output, rtol=1e-15, atol=1e-15)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(step.prev_sample, 0.25 * (x - output) + 0.75 * noise, rtol=1e-15, atol=1e-15)
    last = scheduler.step(output, scheduler.timesteps[1], x).prev_sample
    torch.testing.assert_close(last, x - 0.75 * output, rtol=1e-15, atol=1e-15)


def test_pure_noise_of_a_table_with_zero_snr_is_finite():
    scheduler = ours(DDIMScheduler(**DDIM, **V, **ZERO_SNR))
    scheduler.set_timesteps(2)
    assert scheduler.sigmas[0] == math.inf and scheduler.timesteps.tolist() == [999, 499]
    x, output = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    denoised = scheduler.step(output, 999, x).pred_original_sample
    torch.testing.assert_close(denoised, -output, rtol=0, atol=1e-8)
    assert torch.equal(scheduler.add_noise(output, x, torch.tensor([999])), x)


def test_noise_is_added_in_the_scale_of_the_network():
    x, noise = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    table, flow = ours(LCMScheduler(**SD)), ours(FlowMatchEulerDiscreteScheduler())
    times = torch.tensor([500, 20])
    alpha, std = (value.reshape(2, 1, 1, 1) for value in (ABAR[times].sqrt(), (1 - ABAR[times]).sqrt()))
    torch.testing.assert_close(table.add_noise(x, noise, times), alpha * x + std * noise, rtol=1e-12, atol=1e-12)
    times = torch.tensor([1000.0, 250.0])
    t = (times.double() / 1000).reshape(2, 1, 1, 1)
    torch.testing.assert_close(flow.scale_noise(x, times, noise), (1 - t) * x + t * noise, rtol=1e-12, atol=1e-12)
    by_level = flow.add_noise(x, noise, sigmas=torch.tensor([math.inf, 1 / 3], dtype=torch.float64))
    torch.testing.assert_close(by_level, (1 - t) * x + t * noise, rtol=1e-12, atol=1e-12)


def test_what_the_settings_become():
    scheduler = ours(PNDMScheduler(**SD))
    expected = {
        "prediction": "epsilon",
        "num_train_timesteps": 1000,
        "clip_denoised": False,
        "sigma_min": None,
        "sigma_max": None,
        "time_label": "timestep",
        "in_place_of": {"original_inference_steps": 50, "timestep_scaling": 10.0},
        "original_inference_steps": 50,  # LCM pipelines read it
        "steps_offset": 1,  # as expected by Stable Diffusion pipelines
        "noise_schedule": {"num_train_timesteps": 1000, **BETAS},
    }
    assert {name: scheduler.config[name] for name in expected} == expected
    assert scheduler.sigmas[0] == pytest.approx(14.6146, abs=1e-4)  # SD's level at time 999
    betas = torch.linspace(0.001, 0.01, 20)
    trained = ours(DDIMScheduler(20, trained_betas=betas.numpy(), clip_sample=True))
    abar = (1 - betas.double()).cumprod(0)
    torch.testing.assert_close(trained.sigmas[:-1].flip(0), ((1 - abar) / abar).sqrt(), rtol=1e-4, atol=0)
    assert trained.config.clip_denoised is True


@pytest.mark.parametrize("config", [{}, {"_use_default_values": ["beta_start", "beta_schedule", "prediction_type"]}])
def test_settings_that_diffusers_takes_for_defaults_of_another_class_are_kept(config):
    """`LCMScheduler.from_config(DDIMScheduler().config)` has LCM's betas; a network does not change with its class."""
    origin = DDIMScheduler(1000, 0.0001, 0.02, "linear")
    scheduler = MultistepConsistencyScheduler.from_config({**origin.config, **config})
    levels = ((1 - origin.alphas_cumprod.double()) / origin.alphas_cumprod.double()).sqrt()
    torch.testing.assert_close(scheduler.sigmas[:-1].flip(0), levels, rtol=1e-9, atol=0)


def test_old_files_have_the_defaults_of_their_class():
    """Files from before prediction types lack that setting, but name their class."""
    old = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **BETAS, "skip_prk_steps": True}
    assert MultistepConsistencyScheduler.from_config(old).config.noise_schedule["num_train_timesteps"] == 1000
    with pytest.raises(ValueError, match="Add the _class_name"):
        MultistepConsistencyScheduler.from_config({**BETAS, "skip_prk_steps": True})


def test_settings_of_both_sides_can_be_changed_on_the_way():
    scheduler = ours(EQUAL["SDXL, Euler"][1], prediction_type="v_prediction", timestep_scaling=1e6, s_noise=0.5)
    assert scheduler.config.prediction == "v_prediction" and scheduler.config.s_noise == 0.5
    assert scheduler.config.in_place_of == {"original_inference_steps": 50, "timestep_scaling": 1e6}
    with pytest.raises(ValueError, match="prediction_type would change nothing"):
        MultistepConsistencyScheduler.from_config(scheduler.config, prediction_type="epsilon")
    with pytest.raises(ValueError, match="sigma_max must be None with in_place_of, got 10"):
        ours(LCMScheduler(), sigma_max=10.0)


# --- there and back


def test_a_saved_pipeline_keeps_the_scheduler(tmp_path, caplog):
    pipe, call = pipeline("sd")
    call = {**call, "num_inference_steps": 2, "height": SIZE, "width": SIZE}
    expected = sample(pipe, ours(EQUAL["SD 2.x, DDIM, v"][1]), **call)
    pipe.save_pretrained(tmp_path)
    missing = {name: None for name, part in pipe.components.items() if part is None}
    again = StableDiffusionPipeline.from_pretrained(tmp_path, **missing, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.scheduler, MultistepConsistencyScheduler)
    assert torch.equal(sample(again, again.scheduler, **call), expected)
    assert "not expected" not in caplog.text


@pytest.mark.parametrize("save", [False, True])
@every_swap
def test_the_way_back_gives_the_stock_scheduler_again(swap, save, tmp_path):
    origin = EQUAL[swap][1]
    taken = ours(origin)
    if save:
        taken.save_pretrained(tmp_path)
        taken = MultistepConsistencyScheduler.from_pretrained(tmp_path)
    assert type(origin) in taken.compatibles
    again = type(origin).from_config(taken.config)
    settings = inspect.signature(type(origin).__init__).parameters.keys() - {"self", "kwargs"}
    assert {name: again.config[name] for name in settings} == {name: origin.config[name] for name in settings}
    for one in (origin, again):
        one.set_timesteps(5, **({"mu": 1.0} if origin.config.get("use_dynamic_shifting") else {}))
    assert torch.equal(again.timesteps, origin.timesteps)
    if hasattr(origin, "sigmas"):
        assert torch.equal(again.sigmas, origin.sigmas)
    once_more = MultistepConsistencyScheduler.from_config(again.config)
    ignored = ("_", "prediction_type", "sigma_m")
    assert all(once_more.config[k] == v for k, v in taken.config.items() if not k.startswith(ignored))


@pytest.mark.parametrize(
    "swap", narrowed(EQUAL, "SD 1.x, DPM++ 2M Karras", "SDXL, Euler, v, zero SNR", "SD3, FlowMatchLCM, Karras")
)
def test_every_compatible_class_can_be_swapped(swap):
    taken = ours(EQUAL[swap][1])
    for kind in taken.compatibles:
        lacks_package = "args" in inspect.signature(kind.__init__).parameters
        foreign_algorithm = kind is SASolverScheduler and "algorithm_type" in taken.config  # refused by the class
        if not lacks_package and not foreign_algorithm:
            again = MultistepConsistencyScheduler.from_config(named(kind.from_config(taken.config)))
            for key in ("prediction", "num_train_timesteps", "time_scale"):
                assert again.config[key] == taken.config[key]
            torch.testing.assert_close(again.sigmas, taken.sigmas)


def test_compatibles_are_those_of_the_network():
    names = {kind.__name__ for kind in ours(LCMScheduler()).compatibles}
    assert {"LCMScheduler", "TCDScheduler", "EulerDiscreteScheduler"} <= names
    assert not {"EDMEulerScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler"} & names
    zero_snr = {kind.__name__ for kind in ours(EQUAL["SD 2.x, DDIM, v, zero SNR"][1]).compatibles}
    assert "EulerDiscreteScheduler" in zero_snr and "PNDMScheduler" in names - zero_snr  # PNDM can't have zero SNR
    assert ours(FlowMatchLCMScheduler()).compatibles.count(FlowMatchEulerDiscreteScheduler) == 1
    assert MultistepConsistencyScheduler().compatibles == [CMStochasticIterativeScheduler]
    assert MultistepConsistencyScheduler(time_label="angle").compatibles == []
    assert CTMScheduler().compatibles == TrigFlowScheduler().compatibles == []


# --- refused


def stock_schedulers():
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name, None)  # some names need onnxruntime and have no object
        if inspect.isclass(kind) and issubclass(kind, SchedulerMixin) and kind is not SchedulerMixin:
            yield kind


def with_settings(kind):
    """The default settings of the class, with 3 for each setting without a default."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return {p.name: 3 if p.default is p.empty else p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("kind", stock_schedulers())
def test_every_scheduler_of_diffusers_is_mapped_or_refused(kind):
    """By its name, and by its settings alone unless these match a mapped class."""
    config, name = with_settings(kind), kind.__name__
    mapped = name in [found.__name__ for found in MultistepConsistencyScheduler._get_compatibles()]
    if mapped:
        MultistepConsistencyScheduler.from_config({**config, "_class_name": name})
    else:
        with pytest.raises(ValueError, match=f"Multistep.* can't take the place of a {name}: it can replace"):
            MultistepConsistencyScheduler.from_config({**config, "_class_name": name})
    if not mapped and "Inverse" not in name:  # inverse schedulers, from images to noise, have DDIM's settings
        with pytest.raises(ValueError, match="can't take the place of a scheduler with the settings"):
            MultistepConsistencyScheduler.from_config(config)
    for other, samples in ((CTMScheduler, "two times"), (TrigFlowScheduler, "TrigFlow's process")):
        with pytest.raises(ValueError, match=f"{other.__name__} can't take the place of a {name}: .*{samples}"):
            other.from_config({**config, "_class_name": name})
        with pytest.raises(ValueError, match=f"{other.__name__} can't take the place of a scheduler with"):
            other.from_config(config)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDIMScheduler(**DDIM, prediction_type="flow"), "one of epsilon, v_prediction, sample; it is 'flow'"),
        (DDIMScheduler(**DDIM, thresholding=True), "no counterpart of thresholding=True"),
        (DDIMScheduler(clip_sample_range=2.0), "clip_sample_range of 2.0"),
        (DDPMScheduler(variance_type="learned_range"), "no counterpart of variance_type='learned_range'"),
        (EulerDiscreteScheduler(**V, timestep_type="continuous"), "no counterpart of timestep_type='continuous'"),
        (
            UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            "no counterpart of use_flow_sigmas=True",
        ),
        (DDIMScheduler(**DDIM, **ZERO_SNR), "prediction must not be 'epsilon' on a table that ends with pure noise"),
        (DDIMScheduler(1000, trained_betas=[0.1, 0.2]), "number of trained_betas, 2; it is 1000"),
        (HeunDiscreteScheduler(beta_schedule="exp"), "exp is not implemented"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "no counterpart of invert_sigmas=True"),
        (FlowMatchLCMScheduler(scale_factors=[0.5]), r"no counterpart of scale_factors=\[0.5\]"),
        (EDMEulerScheduler(), "place of a EDMEulerScheduler"),
    ],
)
def test_settings_without_a_counterpart_are_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        ours(scheduler)


def test_ambiguous_configs_are_refused():
    both = {**LCMScheduler().config, **CMStochasticIterativeScheduler().config}
    with pytest.raises(ValueError, match="can't take the place of a scheduler with the settings"):
        MultistepConsistencyScheduler.from_config(both)
    with pytest.raises(ValueError, match="with the settings sigma_maximum"):
        MultistepConsistencyScheduler.from_config({"sigma_maximum": 80.0})
    with pytest.raises(ValueError, match="can't take the place"):
        MultistepConsistencyScheduler.from_config(CTMScheduler().config)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"prediction": "edm"}, "got 'edm'"),
        ({"in_place_of": {"shift": 3.0, "timestep_scaling": 1.0}}, "in_place_of must hold settings among shift"),
        ({"in_place_of": 3}, "in_place_of must hold settings"),
        ({"sigma_min": 0.0}, "sigma_min must be None with in_place_of, got 0.0"),
        ({"default_sigmas": {"1": [1.0]}}, "default_sigmas must be None with in_place_of"),
    ],
)
def test_settings_that_do_not_go_together(config, message):
    flow = {"prediction": "flow", "sigma_min": None, "sigma_max": None, "in_place_of": {"shift": 3.0}}
    MultistepConsistencyScheduler(**flow)
    with pytest.raises(ValueError, match=message):
        MultistepConsistencyScheduler(**{**flow, **config})
    with pytest.raises(ValueError, match="sigma_max must be positive"):
        MultistepConsistencyScheduler(sigma_max=None)


TABLE_OF_SD, FLOW_OF_SD3 = EQUAL["SD 1.x, LCM"][1], EQUAL["SD3, FlowMatchEuler, shift 3"][1]


@pytest.mark.parametrize(
    "scheduler, call, message",
    [
        (TABLE_OF_SD, {"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
        (TABLE_OF_SD, {"num_inference_steps": 51}, "num_inference_steps"),  # an error of diffusers
        (TABLE_OF_SD, {"num_inference_steps": 4, "sigmas": [1.0]}, "exactly one"),
        (TABLE_OF_SD, {"sigmas": [14.0, 0.0]}, "above sigma_min=0.0"),  # Euler's levels end with 0
        (TABLE_OF_SD, {"sigmas": [15.0, 1.0]}, "must not exceed sigma_max=14.6"),
        (TABLE_OF_SD, {"sigmas": [math.inf, 1.0]}, "finite"),
        (TABLE_OF_SD, {"timesteps": [1000, 0]}, r"`timesteps` must lie in \[0, 999\]"),
        (TABLE_OF_SD, {"timesteps": [10, 500]}, "fall strictly"),
        (TABLE_OF_SD, {"timesteps": [500, 10], "strength": 0.1}, "non-empty"),
        (TABLE_OF_SD, {"num_inference_steps": 4, "strength": 0.0}, r"strength must lie in \(0, 1\]"),
        (TABLE_OF_SD, {"num_inference_steps": 4, "mu": 1.0}, "mu shifts the times of flow"),
        (FLOW_OF_SD3, {"sigmas": [80.0, 0.5]}, r"flow times in \(0, 1\]"),
        (FLOW_OF_SD3, {"sigmas": [0.5, 0.9]}, "fall strictly"),
        (FLOW_OF_SD3, {"timesteps": [1200.0]}, r"must lie in \[0, 1000\]"),
        (FLOW_OF_SD3, {"num_inference_steps": 4, "original_inference_steps": 50}, "flow has none"),
        (EQUAL["SD3, FlowMatchEuler, dynamic shift"][1], {"num_inference_steps": 4}, "mu"),  # an error of diffusers
    ],
)
def test_levels_that_can_not_be_are_refused(scheduler, call, message):
    with pytest.raises(ValueError, match=message):
        ours(scheduler).set_timesteps(**call)


@pytest.mark.parametrize("told", [{"original_inference_steps": 50}, {"strength": 0.5}, {"mu": 1.0}])
def test_other_schedulers_are_not_told_what_only_stock_ones_know(told):
    with pytest.raises(ValueError, match="need a scheduler with in_place_of"):
        MultistepConsistencyScheduler().set_timesteps(2, **told)


def test_a_consistency_pipeline_steps_in_its_own_scale():
    with pytest.raises(ValueError, match="steps in the scale of diffusers' pipelines"):
        ConsistencyPipeline(UNet2DModel(8, block_out_channels=(32, 32, 32, 32)), ours(LCMScheduler()))


# --- the statements of docs/schedulers.md


def table():
    lines = ["| model and scheduler | `prediction` | highest sigma | samples are those of |", "|---|---|---|---|"]
    for name, (_, scheduler) in EQUAL.items():
        taken = ours(scheduler)
        kind = "FlowMatchLCMScheduler" if taken.config.prediction == "flow" else "LCMScheduler"
        top = "infinite" if taken.sigmas[0] == math.inf else f"{taken.sigmas[0]:.4g}"
        lines.append(f"| {name} | {taken.config.prediction} | {top} | `{kind}` |")
    return "\n".join(lines)


def test_the_documents_show_the_table():
    document = Path(__file__).parents[2] / "docs" / "schedulers.md"
    assert table() in document.read_text(encoding="utf-8"), f"put this into it:\n{table()}"

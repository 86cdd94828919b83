"""What text-to-image training saves: stock diffusers loads it in a clean process, and makes the same images."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, LCMScheduler
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from cm_diffusers.core.frozen import copied
from cm_diffusers.core.interpolants import VE
from cm_diffusers.engine.saved.base_precision import set_base_precision
from cm_diffusers.engine.saved.lora import add_lora, save_lora, trained_weights
from cm_diffusers.engine.saved.stock import read_scheduler
from cm_diffusers.engine.saved.text import encode_prompts, free_encoders, fuse_loras, read_text_to_image
from cm_diffusers.engine.text import export as text_export
from cm_diffusers.engine.text.clean_process import load_result, two_images
from cm_diffusers.engine.text.export import (
    few_step_scheduler,
    sample_prompts,
    save_fused_model,
    save_lora_model,
    student_pipeline,
)
from cm_diffusers.models import build_unet
from cm_diffusers.models.text_unet import with_guidance_input
from cm_diffusers.objectives import CTM, LCM, ModelSpec
from cm_diffusers.objectives.tcd import TCD
from tests.helpers.tiny_text import PIPELINES


PROMPTS = ["two red circles above a blue square", "a green triangle", "a yellow square"]
SEEDS = [3, 4, 5]
SCHEDULES = {
    "the defaults of another class": DDIMScheduler(clip_sample=False),
    "Stable Diffusion": DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    "unknown to LCMScheduler": DDPMScheduler(beta_schedule="sigmoid"),
    "given": DDPMScheduler(trained_betas=np.linspace(1e-4, 0.03, 500).tolist(), num_train_timesteps=500),
}


def method_of(scheduler, method=LCM, **options):
    """A method for a student with the process of a scheduler."""
    spec = read_scheduler(scheduler)
    spec = ModelSpec(0.5, "timestep", spec.sigma_max, spec.prediction, noise_schedule=spec.noise_schedule)
    network = build_unet("tiny", (8, 8), 1)
    return method(network, spec, method.Options(**options), 10, teacher=spec.denoiser(network), pretrained=True)


def trained(pipe, rank=4, alpha=None):
    """The student of a pipeline, whose LoRA has random weights and has the scheduler of LCM."""
    model = read_text_to_image(pipe)
    student = add_lora(copied(model.network.requires_grad_(False)), rank, alpha)
    generator = torch.Generator().manual_seed(1)
    for weight in trained_weights(student).values():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    scheduler = few_step_scheduler("lcm", pipe.scheduler, method_of(pipe.scheduler))
    return student_pipeline(pipe, student, scheduler)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folders of the base models."""
    folder = tmp_path_factory.mktemp("bases")
    for kind, make in PIPELINES.items():
        make().save_pretrained(folder / kind)
    return folder


def loaded(bases, kind, free=True):
    """A base, its encoded prompts, without encoders."""
    pipe = DiffusionPipeline.from_pretrained(bases / kind)
    condition = encode_prompts(pipe, PROMPTS)
    if free:
        free_encoders(pipe)
    return pipe, condition


# --- the scheduler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_scheduler_has_the_process_of_the_teacher_also_when_loaded(tmp_path, name):
    teacher = SCHEDULES[name]
    scheduler = few_step_scheduler("lcm", teacher, method_of(teacher))
    scheduler.save_pretrained(tmp_path)
    for found in (scheduler, LCMScheduler.from_pretrained(tmp_path)):
        torch.testing.assert_close(found.alphas_cumprod, teacher.alphas_cumprod, rtol=1e-6, atol=0)
        assert not found.config.clip_sample and not found.config.thresholding
    assert not any(key.startswith("_use") for key in json.loads((tmp_path / "scheduler_config.json").read_text()))


@pytest.mark.parametrize("method, kind", [(LCM, "LCMScheduler"), (TCD, "TCDScheduler")])
@pytest.mark.parametrize("levels", [50, 40, 30])
def test_sampling_starts_at_the_top_and_stays_on_the_levels_of_the_training(method, kind, levels):
    teacher = SCHEDULES["Stable Diffusion"]
    objective = method_of(teacher, method, num_ddim_timesteps=levels)
    scheduler = few_step_scheduler(method.name, teacher, objective)
    assert type(scheduler).__name__ == kind
    for steps in range(1, 9):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == steps
        if 1000 % levels == 0:
            sigmas = objective.spec.process.sigma(scheduler.timesteps.double())
            assert all((objective.sigmas - sigma).abs().min() < 1e-9 for sigma in sigmas)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_levels_above_the_student_s_are_left_out(prediction):
    teacher = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction)
    objective = method_of(teacher)
    scheduler = few_step_scheduler("lcm", teacher, objective)
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        sigma = objective.spec.process.sigma(scheduler.timesteps.double())
        above = objective.spec.process.sigma(scheduler.timesteps[:1].double() + 1)
        assert sigma[0] <= objective.spec.sigma_max < above
        assert torch.isfinite(scheduler.step(torch.ones(1), scheduler.timesteps[0], torch.ones(1)).denoised).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_s_scheduler_denoises_as_the_consistency_function(prediction, steps):
    teacher = DDIMScheduler.from_config(SCHEDULES["Stable Diffusion"].config, prediction_type=prediction)
    objective = method_of(teacher)
    spec, scheduler = objective.spec, few_step_scheduler("lcm", teacher, objective)
    denoise = spec.denoiser(objective.network)
    scheduler.set_timesteps(steps)
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for time in scheduler.timesteps:
        sigma = spec.process.sigma(time.double()).float().expand(2)
        with torch.no_grad():
            expected = denoise(sample / spec.process.alpha(sigma)[:, None, None, None], sigma)
            output = objective.network(sample, time).sample
        found = scheduler.step(output, time, sample)
        torch.testing.assert_close(found.denoised, expected, rtol=0, atol=3e-6 * expected.abs().max().item())
        sample = found.prev_sample


def test_tcd_s_scheduler_jumps_as_the_trained_function():
    teacher = SCHEDULES["Stable Diffusion"]
    objective = method_of(teacher, TCD)
    spec, scheduler = objective.spec, few_step_scheduler("tcd", teacher, objective)
    scheduler.set_timesteps(2)
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second = (spec.process.sigma(time.double()).float().expand(2) for time in scheduler.timesteps)
    with torch.no_grad():
        x = sample / spec.process.alpha(first)[:, None, None, None]
        expected = objective.jump(x, spec.denoiser(objective.network)(x, first), first, second)
        output = objective.network(sample, scheduler.timesteps[0]).sample
    found = scheduler.step(output, scheduler.timesteps[0], sample, eta=0.0).prev_sample
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * expected.abs().max().item())
    again = VE().jump(x, x - first[:, None, None, None] * output, first, second)  # of a network that predicts epsilon
    torch.testing.assert_close(found, again * spec.process.alpha(second)[:, None, None, None], rtol=1e-4, atol=1e-4)


def test_what_no_stock_scheduler_samples_is_refused():
    teacher, network = SCHEDULES["Stable Diffusion"], build_unet("tiny", (8, 8), 1)
    edm = ModelSpec(0.5)
    method = LCM(network, edm, LCM.Options(), 10, teacher=edm.denoiser(network), pretrained=True)
    with pytest.raises(ValueError, match="samples a student of the method lcm, because its network predicts 'edm'"):
        few_step_scheduler("lcm", teacher, method)
    two = CTM(CTM.adapt(network, edm), edm, CTM.Options(), 10, teacher=edm.denoiser(network), pretrained=True)
    with pytest.raises(ValueError, match="the method ctm, because its network has two times. Choose"):
        few_step_scheduler("ctm", teacher, two)


# --- the pipeline of a student, and its images ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_student_shares_everything_but_its_network_and_scheduler(kind):
    pipe = PIPELINES[kind]()
    unet, scheduler, config = pipe.unet, pipe.scheduler, dict(pipe.config)
    student = student_pipeline(pipe, copy.deepcopy(unet), LCMScheduler())
    assert type(student) is type(pipe)
    assert {name for name, part in pipe.components.items() if getattr(student, name) is not part} == {
        "unet",
        "scheduler",
    }
    assert pipe.unet is unet and pipe.scheduler is scheduler and dict(pipe.config) == config
    assert student.config.scheduler == ("diffusers", "LCMScheduler")


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", PIPELINES)
def test_images_of_embeddings_are_those_of_the_prompts(bases, kind, scale):
    whole, _ = loaded(bases, kind, free=False)
    pipe, condition = loaded(bases, kind)
    whole.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    settings = {"num_inference_steps": 3, "guidance_scale": scale}
    expected = whole(PROMPTS, generator=generators, output_type="np", **settings).images
    found = sample_prompts(pipe, condition, SEEDS, **settings)
    assert found.shape == (3, 8, 8, 3) and expected.std() > 0.01
    assert np.abs(found - expected).max() < 1e-5
    singly = sample_prompts(pipe, condition, SEEDS, **settings, batch_size=1)
    assert np.abs(singly - found).max() < 1e-5
    latents = sample_prompts(pipe, condition, SEEDS, **settings, output_type="latent")
    assert latents.shape == (3, 4, 4, 4)


def test_the_sizes_of_the_prompts_are_those_of_the_images(bases):
    pipe, condition = loaded(bases, "sdxl")
    small = sample_prompts(pipe, condition, SEEDS, 2)
    wide = condition.also(sizes=torch.tensor([[32.0, 32, 4, 4, 8, 16]]).expand(3, 6))
    assert sample_prompts(pipe, wide, SEEDS, 2).shape == (3, 8, 16, 3)
    for other in ([32.0, 32, 0, 0, 8, 8], [8.0, 8, 4, 0, 8, 8]):
        told = condition.also(sizes=torch.tensor([other]).expand(3, 6))
        assert not np.array_equal(sample_prompts(pipe, told, SEEDS, 2), small)
    mixed = condition.also(sizes=torch.tensor([[8.0, 8, 0, 0, 8, 8], [8, 8, 0, 0, 8, 16], [8, 8, 0, 0, 8, 8]]))
    with pytest.raises(ValueError, match="the prompts of a batch must have one size; got .*16"):
        sample_prompts(pipe, mixed, SEEDS, 2)


def test_an_input_for_the_guidance_gets_the_scale(bases):
    pipe, condition = loaded(bases, "sd")
    network = with_guidance_input(read_text_to_image(pipe).network, 8)
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight)
    student = student_pipeline(pipe, network, LCMScheduler())
    without_nulls = condition.with_nulls({})
    images = [sample_prompts(student, without_nulls, SEEDS, 2, scale) for scale in (1.0, 4.0)]
    assert np.abs(images[0] - images[1]).max() > 1e-5
    with pytest.raises(ValueError, match="no null rows"):
        sample_prompts(pipe, without_nulls, SEEDS, 2, 4.0)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_base_in_few_bits_makes_nearly_the_same_images(bases, precision):
    pipe, condition = loaded(bases, "sd")
    expected = sample_prompts(pipe, condition, SEEDS, 2)
    set_base_precision(pipe.unet, precision, "bf16", "cpu")
    found = sample_prompts(pipe, condition, SEEDS, 2)
    assert 0 < np.abs(found - expected).max() < 0.05


# --- what is saved --------------------------------------------------------------------------------------------------


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind, alpha", [("sd", 16.0), ("sdxl", None)])
def test_a_lora_makes_the_same_images_where_only_diffusers_is(bases, tmp_path, kind, alpha):
    student = trained(loaded(bases, kind)[0], alpha=alpha)
    verify = kind == "sd"  # in a clean process, which takes long to start
    save_lora_model(student, tmp_path / "lora", str(bases / kind), verify=verify)
    assert files(tmp_path / "lora") == {"pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"}
    for path in (tmp_path / "lora").rglob("*"):
        assert path.is_dir() or str(bases).encode() not in path.read_bytes()
    found = load_result(tmp_path / "lora", str(bases / kind), [], None)
    expected = two_images(student)
    assert np.abs(two_images(found) - expected).max() < 1e-5
    if alpha:
        found.unet.set_adapters("default_0", 4 / alpha)  # controls: another scale, and another scheduler
        assert np.abs(two_images(found) - expected).max() > 1e-3
        found.unet.set_adapters("default_0", 1.0)
    assert np.abs(two_images(found) - expected).max() < 1e-5
    found.scheduler = DDIMScheduler.from_config(student.scheduler.config)
    assert np.abs(two_images(found) - expected).max() > 0.01


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_fused_pipeline_is_complete_and_makes_the_images_of_the_lora(bases, tmp_path, kind):
    pipe, condition = loaded(bases, kind)
    student = trained(pipe, alpha=8)
    before = {name: value.clone() for name, value in student.unet.state_dict().items()}
    expected = sample_prompts(student, condition, SEEDS, 2)
    save_fused_model(student, tmp_path / "fused", str(bases / kind), verify=kind == "sdxl")
    assert student.text_encoder is None  # what was free stays free
    assert all(torch.equal(value, before[name]) for name, value in student.unet.state_dict().items())
    assert files(tmp_path / "fused") == files(bases / kind)
    for path in (tmp_path / "fused").rglob("*.json"):
        assert str(bases) not in path.read_text() and str(tmp_path) not in path.read_text()
    whole = DiffusionPipeline.from_pretrained(tmp_path / "fused")
    assert type(whole) is type(pipe) and type(whole.scheduler) is LCMScheduler
    assert not hasattr(whole.unet, "peft_config")
    assert np.abs(sample_prompts(whole, encode_prompts(whole, PROMPTS), SEEDS, 2) - expected).max() < 1e-4


def test_a_safety_checker_stays_in_the_fused_pipeline_without_a_word(bases, tmp_path, capfd):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    words = {**small, "vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=words, vision_config=vision, projection_dim=8))
    pipe, _ = loaded(bases, "sd", free=False)
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessor())
    pipe.save_pretrained(tmp_path / "base")
    free_encoders(pipe)
    trained(pipe)
    capfd.readouterr()
    save_fused_model(pipe, tmp_path / "whole", str(tmp_path / "base"), verify=False)
    captured = capfd.readouterr()
    assert "StableDiffusionSafetyChecker" not in captured.out + captured.err
    assert "safety_checker" in DiffusionPipeline.load_config(tmp_path / "whole")
    assert (tmp_path / "whole" / "safety_checker" / "model.safetensors").is_file()


def test_a_student_with_all_weights_is_saved_whole(bases, tmp_path):
    pipe, condition = loaded(bases, "sd")
    network = with_guidance_input(read_text_to_image(pipe).network, 8)
    torch.nn.init.normal_(network.time_embedding.cond_proj.weight)
    student = student_pipeline(pipe, network, LCMScheduler())
    save_fused_model(student, tmp_path / "whole", str(bases / "sd"), verify=False)
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    images = [sample_prompts(one, condition, SEEDS, 2, 4.0) for one in (student, whole)]
    assert np.array_equal(*images)
    whole.set_progress_bar_config(disable=True)
    assert whole(PROMPTS[:1], num_inference_steps=1, guidance_scale=4.0).images[0].size == (8, 8)


def test_loras_of_the_teacher_stay_a_part_of_the_base(bases, tmp_path):
    save_lora(trained(loaded(bases, "sd")[0], rank=2), tmp_path / "style")
    pipe, condition = loaded(bases, "sd")
    plain = sample_prompts(pipe, condition, SEEDS, 2)
    fuse_loras(pipe, [str(tmp_path / "style")])
    assert np.abs(sample_prompts(pipe, condition, SEEDS, 2) - plain).max() > 1e-3
    student, loras = trained(pipe), [str(tmp_path / "style")]
    save_lora_model(student, tmp_path / "lora", str(bases / "sd"), loras=loras, verify=False)
    found = load_result(tmp_path / "lora", str(bases / "sd"), loras, None)
    assert np.abs(two_images(found) - two_images(student)).max() < 1e-4
    save_fused_model(student, tmp_path / "fused", str(bases / "sd"), loras=loras, verify=False)
    found = load_result(tmp_path / "fused", None, [], None)
    assert np.abs(two_images(found) - two_images(student)).max() < 1e-4


@pytest.mark.wide
def test_a_lora_on_a_base_in_few_bits_is_verified_on_the_same_base(bases, tmp_path):
    pipe, _ = loaded(bases, "sd")
    set_base_precision(pipe.unet, "int8", "bf16", "cpu")
    save_lora_model(trained(pipe), tmp_path / "lora", str(bases / "sd"))


def test_a_result_that_does_not_pass_leaves_the_old_one(bases, tmp_path, monkeypatch):
    student, folder = trained(loaded(bases, "sd")[0]), tmp_path / "lora"
    save_lora_model(student, folder, str(bases / "sd"), verify=False)
    old = (folder / "pytorch_lora_weights.safetensors").read_bytes()

    def save_less(pipeline, folder):
        save_lora(pipeline, folder)
        for weight in trained_weights(student.unet).values():
            weight.data *= 1.1

    monkeypatch.setattr(text_export, "save_lora", save_less)
    with pytest.raises(RuntimeError, match="images of the saved model differ by up to .*It is kept in .*tmp-lora"):
        save_lora_model(student, folder, str(bases / "sd"))
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == old and (tmp_path / ".tmp-lora").exists()
    with pytest.raises(OSError, match="full"):
        save_lora_model(student, folder, str(bases / "sd"), verify=False, complete=lambda written: _fail(written))
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == old
    assert not (tmp_path / ".tmp-lora").exists()
    save_lora_model(student, folder, str(bases / "sd"), verify=False, complete=lambda at: (at / "README.md").touch())
    assert "README.md" in files(folder) and (folder / "pytorch_lora_weights.safetensors").read_bytes() != old


def _fail(written):
    assert files(written)
    raise OSError("the disk is full")

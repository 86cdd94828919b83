"""Runs that start from diffusers models: they train, resume and save a model that samples."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, DiTPipeline
from safetensors.torch import load_file

from cm_diffusers import ConsistencyPipeline, DenoisingPipeline
from cm_diffusers.core.conditions import of_classes
from cm_diffusers.engine.config import ModelArguments
from cm_diffusers.engine.evaluation.watch import follow
from cm_diffusers.engine.processes import start_accelerator
from cm_diffusers.engine.saved.export import verify_export
from cm_diffusers.engine.saved.start import denoiser_of, load_pipeline, load_teacher
from cm_diffusers.objectives import OBJECTIVES
from tests.helpers.breadth import narrowed
from tests.helpers.stock_pipelines import PIPELINES, autoencoder_kl, autoencoder_tiny, dit, save, unet
from tests.helpers.training_runs import differences, read_log, run, tensors


TRAINED_FROM = [
    *(("epsilon", method) for method in ("ct", "ict", "ect", "ecd", "cd", "lcm", "tcd")),
    *(("v", "ect"), ("v, zero snr", "cd"), ("edm", "ect"), ("edm, v", "ecd")),
    *(("flow", method) for method in ("ect", "cd", "scd", "sct")),
    *(("ldm", "ecd"), ("dit", "ect"), ("dit", "cd")),
]
SETTINGS = {"cd": {"num_scales": 6}, "ct": {"s1": 12}, "ict": {"s0": 4, "s1": 16}}
SETTINGS |= dict.fromkeys(("sct", "scd"), {"tangent_warmup_steps": 3})
SETTINGS |= {"ctm": {"solver_steps": 2}}


def start(kind, method, folder, **settings):
    """A run of `method` from the diffusers model `kind`, which is the teacher if the method has one."""
    teacher = PIPELINES[kind]()
    save(kind, folder / "teacher", teacher)
    network = teacher.components.get("unet") or teacher.transformer
    if getattr(network.config, "num_class_embeds", None) is None and kind != "dit":
        settings["class_conditional"] = None
    taught = "pretrained_teacher_model" in OBJECTIVES[method].Options.__dataclass_fields__
    settings["pretrained_teacher_model" if taught else "pretrained_model_name_or_path"] = folder / "teacher"
    # with random weights, an L2 distance at sigma 80 has gradients that RAdam's first steps do not scale down
    defaults = {"model_preset": None, "max_train_steps": 4, "learning_rate": 1e-6, "optimizer": "adam"}
    defaults |= SETTINGS.get(method, {})
    return run(folder / "run", method, **{**defaults, **settings})


@pytest.mark.parametrize("kind, method", narrowed(TRAINED_FROM, *TRAINED_FROM[::4]))
def test_a_student_keeps_its_teacher_s_process_and_samples_after_reloading(kind, method, tmp_path):
    folder = start(kind, method, tmp_path) / "pipeline"
    teacher, student = load_teacher(str(tmp_path / "teacher"), ModelArguments()), load_pipeline(str(folder))
    denoiser, labels = denoiser_of(student), torch.zeros(4, dtype=torch.long) if student.num_classes else None
    assert type(student) is ConsistencyPipeline
    assert student.scheduler.config.prediction == teacher.spec.prediction
    assert student.scheduler.config.sigma_max == teacher.spec.sigma_max <= 80
    assert all(row["skipped"] == 0 for row in read_log(tmp_path / "run"))

    sigma = torch.tensor([0.1, 1.0, 5.0, 40.0])
    x = sigma.reshape(-1, 1, 1, 1) * torch.randn(4, *student.sample_shape)
    with torch.no_grad():
        moved = denoiser(x, sigma, of_classes(labels)) - teacher.denoiser(x, sigma, of_classes(labels))
    assert 0 < moved.abs().max() and moved.square().mean().sqrt() < 0.3  # after four training steps

    again = DiffusionPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    arguments = {"class_labels": [1, 2]} if labels is not None else {"batch_size": 2}
    images = again(**arguments, sigmas=[student.scheduler.config.sigma_max, 0.8], output_type="np").images
    assert images.shape == (2, 8, 8, 1) and images.std() > 0


@pytest.mark.parametrize(
    "kind, method",
    [*((kind, "ctm") for kind in ("epsilon", "v, zero snr", "flow", "edm", "edm, v")), ("flow", "mean_flow")],
)
def test_a_trajectory_model_begins_as_its_teacher_and_jumps_after_reloading(kind, method, tmp_path):
    student = load_pipeline(str(start(kind, method, tmp_path, max_train_steps=2) / "pipeline"))
    teacher = load_teacher(str(tmp_path / "teacher"), ModelArguments())
    student.set_progress_bar_config(disable=True)
    labels = torch.tensor([1, 2]) if student.num_classes else None
    noise = torch.randn(2, *student.sample_shape)
    if method == "ctm":
        student.scheduler.register_to_config(clip_denoised=False)
        x, sigma = 3.3 * noise, torch.full((2,), 3.3)
        denoised = teacher.denoiser(x, sigma, of_classes(labels))
        jumped = student.jump(x, 3.3, 1.1, labels)
        torch.testing.assert_close(jumped, (x + 2 * denoised) / 3, rtol=0.03, atol=0.03)  # after two training steps
    made = student(class_labels=labels, latents=noise, sigmas=[3.3, 0.5], output_type="latent").images
    again = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    again.set_progress_bar_config(disable=True)
    if method == "ctm":
        again.scheduler.register_to_config(clip_denoised=False)
    assert again(class_labels=labels, latents=noise, sigmas=[3.3, 0.5], output_type="latent").images.equal(made)
    denoiser, sigma = denoiser_of(student), torch.tensor([3.3, 0.5])
    one = student(class_labels=labels, latents=noise, sigmas=[3.3], output_type="latent").images
    with torch.no_grad():
        start_of = noise / (1 / 3.3 + 1) * (1 + 3.3) if method == "mean_flow" else 3.3 * noise
        expected = denoiser(start_of, torch.full((2,), 3.3), of_classes(labels))
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind, method",
    narrowed(
        [("epsilon", "diffusion"), ("v, zero snr", "cdm"), ("flow", "diffusion"), ("edm", "cdm")],
        ("epsilon", "diffusion"),
    ),
)
def test_a_diffusion_model_is_tuned_on_its_own_process_and_teaches(kind, method, tmp_path):
    folder = start(kind, method, tmp_path, max_train_steps=2) / "pipeline"
    tuned, teacher = load_pipeline(str(folder)), load_teacher(str(tmp_path / "teacher"), ModelArguments())
    assert type(tuned) is DenoisingPipeline and tuned.config.prediction == teacher.spec.prediction
    labels = torch.tensor([1, 2]) if tuned.num_classes else None
    for sigma in (40.0, 3.3, 0.05):
        x, levels = sigma * torch.randn(2, 1, 8, 8), torch.full((2,), sigma)
        with torch.no_grad():
            denoised = tuned.denoise(x, levels[0], labels)
            torch.testing.assert_close(
                denoised, denoiser_of(tuned)(x, levels, of_classes(labels)), rtol=1e-4, atol=1e-4
            )
            moved = load_teacher(str(folder), ModelArguments()).denoiser(x, levels, of_classes(labels)) - denoised
            assert moved.abs().max() < 1e-3
            away = denoised - teacher.denoiser(x, levels, of_classes(labels))
        assert 0 < away.square().mean().sqrt() < 0.3  # after two training steps
    verify_export(tuned, folder)  # in a clean process, the folder's own code samples the same images


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow", "edm, v"])
def test_one_step_of_the_student_s_pipeline_is_its_denoiser(kind, tmp_path):
    pipe = load_pipeline(str(start(kind, "ect", tmp_path, max_train_steps=1) / "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.register_to_config(clip_denoised=False)
    labels = torch.tensor([1, 2]) if pipe.num_classes else None
    noise = torch.randn(2, 1, 8, 8)
    for sigma in (pipe.scheduler.config.sigma_max, 3.3, 0.05):
        made = pipe(class_labels=labels, latents=noise, sigmas=[sigma], output_type="latent").images
        with torch.no_grad():
            expected = denoiser_of(pipe)(sigma * noise, torch.full((2,), sigma), of_classes(labels))
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind, method", narrowed([("epsilon", "cd"), ("flow", "scd"), ("dit", "ect")], ("flow", "scd"))
)
def test_a_stopped_run_is_resumed_bit_for_bit(kind, method, tmp_path, monkeypatch):
    whole = start(kind, method, tmp_path / "whole")
    loss = OBJECTIVES[method].loss

    def loss_with_signal(self, batch, draws):
        if draws.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(OBJECTIVES[method], "loss", loss_with_signal)
        with pytest.raises(SystemExit):
            start(kind, method, tmp_path / "stopped")
    stopped = start(kind, method, tmp_path / "stopped")
    assert differences(stopped, whole) == []
    assert read_log(stopped) == read_log(whole)


def test_the_exported_folder_is_verified_in_a_clean_process(tmp_path, monkeypatch):
    """A DiT with an autoencoder on a VP process: the folder holds the code of network, scheduler and pipeline."""
    folder = start("dit", "ect", tmp_path, max_train_steps=1) / "pipeline"
    verify_export(load_pipeline(str(folder)), folder)


# --- refused starts, whose messages name possible ones


@pytest.mark.parametrize(
    "kind, method, message",
    [
        (
            "epsilon",
            "scd",
            "scd needs the network's deriv.*integer times. It can start diffusion, cdm, ct, .*ctm\\.",
        ),
        ("v", "sct", "sct needs .*It can start diffusion, cdm, ct, .*ctm. Give another network"),
        ("epsilon", "mean_flow", "mean_flow needs the network"),
        ("sample", "ctm", "not the identity at noise level 0"),
        ("dit", "ctm", "DiTModel can't read a second time"),
        ("sample", "ect", "not the identity at noise level 0"),
        ("edm", "scd", r"1/4 ln\(sigma\), which varies too fast"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused_with_what_does(kind, method, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(kind, method, tmp_path)


@pytest.mark.parametrize("kind, method", [("epsilon", "scd"), ("sample", "ecd"), ("v", "ctm")])
def test_such_a_model_may_teach(kind, method, tmp_path):
    settings = {"solver_steps": 2} if method == "ctm" else {}
    start(kind, method, tmp_path, from_scratch=True, model_preset="tiny", max_train_steps=4, **settings)


def test_a_consistency_model_of_diffusers_is_no_teacher_but_a_start(tmp_path):
    model = run(tmp_path / "a", "ect", max_train_steps=1) / "pipeline"
    with pytest.raises(ValueError, match="the teacher must be a diffusion model"):
        load_teacher(str(model), ModelArguments())
    run(tmp_path / "b", "ect", max_train_steps=1, pretrained_model_name_or_path=model)


def test_students_of_a_table_that_ends_early_sample_from_its_end(tmp_path):
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    save(None, tmp_path / "teacher", DDPMPipeline(unet(), DDPMScheduler(**schedule)))
    settings = {"class_conditional": None, "pretrained_teacher_model": tmp_path / "teacher", "max_train_steps": 2}
    for name, more in {"kept": {}, "new": {"from_scratch": True}}.items():
        student = load_pipeline(str(run(tmp_path / name, "cd", **settings, **more) / "pipeline"))
        assert student.scheduler.config.sigma_max == pytest.approx(14.61, abs=0.01)


# --- guidance


def test_guidance_is_on_the_denoiser(tmp_path):
    save("dit", tmp_path)
    from cm_diffusers.engine.saved.start import guided

    teacher = load_teacher(str(tmp_path), ModelArguments())
    x, sigma, labels = torch.randn(3, 4, 4, 4), torch.tensor([0.3, 2.0, 30.0]), torch.tensor([1, 2, 3])
    given, null = (
        teacher.denoiser(x, sigma, of_classes(labels)),
        teacher.denoiser(x, sigma, of_classes(torch.full((3,), 10))),
    )
    assert not torch.allclose(given, null)
    torch.testing.assert_close(
        guided(teacher, 3.0)(x, sigma, of_classes(labels)), null + 3 * (given - null), rtol=1e-4, atol=1e-4
    )
    assert guided(teacher, 1.0) == teacher.denoiser


def test_guidance_without_a_class_for_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_guidance_scale .* This teacher has no null class"):
        start("v", "cd", tmp_path / "a", teacher_guidance_scale=2.0)
    with pytest.raises(ValueError, match="teacher_guidance_scale .* This teacher is unconditional"):
        start("epsilon", "cd", tmp_path / "b", teacher_guidance_scale=2.0)
    with pytest.raises(ValueError, match="teacher_guidance_scale .* needs --pretrained_teacher_model"):
        run(tmp_path / "c", "ect", teacher_guidance_scale=2.0)


def test_guided_distillation_differs(tmp_path):
    plain, strong = start("dit", "cd", tmp_path / "a"), start("dit", "cd", tmp_path / "b", teacher_guidance_scale=3.0)
    assert read_log(plain)[-1]["loss"] != read_log(strong)[-1]["loss"]


# --- latents


@pytest.fixture
def tiny_dit(tmp_path):
    """A DiT on latents of an AutoencoderTiny, which halves images once per stage."""
    vae = autoencoder_tiny()
    vae.save_pretrained(tmp_path / "vae")
    with torch.no_grad():
        size = vae.encode(torch.zeros(1, 1, 8, 8)).latents.shape[-1]
    DiTPipeline(dit(size=size), vae, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


def test_a_dit_on_latents_of_a_tiny_autoencoder(tiny_dit, tmp_path):
    folder = run(tmp_path / "run", "ect", pretrained_model_name_or_path=tiny_dit, max_train_steps=3) / "pipeline"
    pipe = load_pipeline(str(folder))
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.vae).__name__ == "AutoencoderTiny" and not pipe.scheduler.config.clip_denoised
    assert pipe(class_labels=[1, 2], output_type="np").images.shape == (2, 8, 8, 1)
    assert pipe(class_labels=[1, 2], output_type="latent").images.shape == (2, *pipe.sample_shape)


def test_latents_are_those_of_the_autoencoder_and_decode(tmp_path):
    """Training shifts and scales the latents; the pipeline undoes both."""
    from cm_diffusers.engine.data.latents import encode

    vae, images = autoencoder_kl(), torch.rand(3, 1, 8, 8) * 2 - 1
    latents = encode(vae, images)
    with torch.no_grad():
        raw = vae.encode(images).latent_dist.mean
        torch.testing.assert_close(latents, (raw - 0.1) * 0.7)
        pipe = ConsistencyPipeline(unet(4, 4), load_scheduler(), vae)
        torch.testing.assert_close(pipe.decode(latents), vae.decode(raw).sample)


def load_scheduler():
    from cm_diffusers import MultistepConsistencyScheduler

    return MultistepConsistencyScheduler()


def test_a_latent_model_from_nothing_and_its_distillation_are_watched_without_images(tmp_path, monkeypatch):
    autoencoder_kl().save_pretrained(tmp_path / "vae")
    latent = {"vae_name_or_path": tmp_path / "vae", "cache_latents": True}
    teacher = run(tmp_path / "teacher", "diffusion", **latent, max_train_steps=2) / "pipeline"
    pipe = load_pipeline(str(teacher))
    assert pipe.sample_shape == (4, 4, 4) and type(pipe.vae).__name__ == "AutoencoderKL"
    student = run(tmp_path / "student", "cd", pretrained_teacher_model=teacher, max_train_steps=2, num_scales=4)
    assert type(load_pipeline(str(student / "pipeline")).vae).__name__ == "AutoencoderKL"
    sigma_data = load_pipeline(str(teacher)).scheduler.config.sigma_data
    kept = load_file(tmp_path / "teacher" / "latents.safetensors")["latents"]
    assert kept.shape == (100, 4, 4, 4) and sigma_data == pytest.approx(kept.square().mean().sqrt().item(), abs=1e-4)

    monkeypatch.setattr("cm_diffusers.engine.data.images.load_source", None)
    for folder in (tmp_path / "teacher", student):
        [(step, watched)] = follow(folder, start_accelerator(), (), tmp_path / "aside")
        exported = load_pipeline(str(folder / "pipeline"))
        assert step == 2 and all(
            value.equal(getattr(watched, part).state_dict()[name])
            for part in ("unet", "vae")
            for name, value in getattr(exported, part).state_dict().items()
        )
        levels = {name: value for name, value in exported.scheduler.config.items() if name[0] != "_"}
        assert levels.items() <= watched.scheduler.config.items()
    elsewhere = SimpleNamespace(device=torch.device("meta"), is_main_process=True)  # stands for a GPU
    [(_, watched)] = follow(student, elsewhere, (), tmp_path / "aside")
    assert watched.unet.device == watched.vae.device == elsewhere.device


def test_kept_latents_are_read_again_unless_they_are_others_or_damaged(tmp_path, monkeypatch, capsys):
    from cm_diffusers.engine.data import latents

    autoencoder_kl().save_pretrained(tmp_path / "vae")
    settings = {"vae_name_or_path": tmp_path / "vae", "cache_latents": True}
    folder = run(tmp_path / "run", "diffusion", **settings)
    whole = tensors(folder)
    calls, encode = [], latents.encode
    monkeypatch.setattr(latents, "encode", lambda *args: calls.append(1) or encode(*args))
    run(folder, "diffusion", **settings)
    assert not calls
    file = folder / "latents.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    run(folder, "diffusion", **settings)
    assert calls and "is damaged" in capsys.readouterr().out
    assert all(value.equal(tensors(folder)[key]) for key, value in whole.items())
    autoencoder_kl(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    calls.clear()
    with pytest.raises(ValueError, match="another dataset: the fingerprint of images .or latents. and labels was"):
        run(folder, "diffusion", **settings)
    assert calls and "of another autoencoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"random_flip": True}, "random_flip is not for latents"),
        ({"channels": 3}, "the autoencoder takes images of 1 channels, the dataset gives 3"),
    ],
)
def test_what_latents_exclude_is_refused(settings, message, tmp_path):
    autoencoder_kl().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "ect", vae_name_or_path=tmp_path / "vae", **settings)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="is a UNet2DModel; this version reads AutoencoderKL"):
        run(tmp_path / "a", "ect", vae_name_or_path=tmp_path / "unet")
    with pytest.raises(ValueError, match="vae_name_or_path .* can't be loaded"):
        run(tmp_path / "b", "ect", vae_name_or_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cache_latents needs an autoencoder"):
        run(tmp_path / "c", "ect", cache_latents=True)

"""Properties of all pipelines."""

import inspect
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
)

from cm_diffusers import (
    ConsistencyPipeline,
    CTMPipeline,
    CTMScheduler,
    DenoisingPipeline,
    MeanFlowPipeline,
    MultistepConsistencyScheduler,
    TrigFlowPipeline,
    TrigFlowScheduler,
    TwoTimeModel,
)


KINDS = {
    "consistency": lambda network: ConsistencyPipeline(network, MultistepConsistencyScheduler()),
    "ctm": lambda network: CTMPipeline(network, CTMScheduler()),
    "ctm, gamma": lambda network: CTMPipeline(network, CTMScheduler(gamma=0.7)),
    "denoising": lambda network: DenoisingPipeline(network, EDMEulerScheduler()),
    "flow": lambda network: DenoisingPipeline(network, EDMEulerScheduler(), prediction="flow"),
    "trigflow": lambda network: TrigFlowPipeline(network, TrigFlowScheduler()),
    "trigflow heun": lambda network: TrigFlowPipeline(network, TrigFlowScheduler(solver="heun")),
    "mean flow": lambda network: MeanFlowPipeline(network, FlowMatchEulerDiscreteScheduler()),
}
DIFFUSION = ["denoising", "flow", "trigflow heun"]
TWO_TIMES = ["ctm", "ctm, gamma", "mean flow"]
CLASSES = 10
STEPS = 5


@pytest.fixture
def make_kind(tiny_unet):
    def build(kind, **unet):
        network = tiny_unet(**unet)
        if kind in TWO_TIMES:
            network = TwoTimeModel.from_network(network)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        pipe = KINDS[kind](network)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture(params=KINDS)
def make(request, make_kind):
    return lambda **unet: make_kind(request.param, **unet)


@pytest.fixture
def pipe(make):
    return make()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(pipe, **arguments):
    """Images (B, C, H, W) as a tensor; by default one image, in a few steps from a fixed noise."""
    arguments = {"num_inference_steps": STEPS, "output_type": "pt", "generator": generator(), **arguments}
    return pipe(**arguments).images


def test_output_types(pipe):
    tensor = images(pipe, class_labels=[1, 2])
    array = images(pipe, class_labels=[1, 2], output_type="np")
    pictures = images(pipe, class_labels=[1, 2], output_type="pil")
    assert tensor.shape == (2, 1, 8, 8) and array.shape == (2, 8, 8, 1)
    assert (array == tensor.permute(0, 2, 3, 1).numpy()).all()
    assert 0 <= tensor.min() < tensor.max() <= 1
    assert ((tensor == 0) | (tensor == 1)).float().mean() < 0.5  # otherwise this file's tests would detect little
    for picture, values in zip(pictures, array):
        assert isinstance(picture, PIL.Image.Image) and picture.size == (8, 8) and picture.mode == "L"
        assert (np.asarray(picture) == (values[..., 0] * 255).round()).all()


def test_default_is_one_pil_image(pipe):
    output = pipe(generator=generator())
    assert isinstance(output, ImagePipelineOutput)
    assert len(output.images) == 1 and isinstance(output.images[0], PIL.Image.Image)


@pytest.mark.parametrize("channels, size", [(1, (8, 16)), (2, (8, 8)), (3, (12, 4)), (4, (8, 8))])
def test_any_shape(make, channels, size):
    pipe = make(channels=channels, size=size, num_classes=None)
    assert pipe.sample_shape == (channels, *size) and pipe.num_classes is None
    assert images(pipe, batch_size=3).shape == (3, channels, *size)
    if channels == 3:
        assert images(pipe, output_type="pil")[0].size == size[::-1]


def test_saved_pipeline_makes_the_same_images(make, tmp_path):
    pipe = make(channels=3)
    pipe.save_pretrained(tmp_path)
    for cls in (DiffusionPipeline, type(pipe)):
        again = cls.from_pretrained(tmp_path)
        assert type(again) is type(pipe) and type(again.scheduler) is type(pipe.scheduler)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(images(again, class_labels=[3, 4]), images(pipe, class_labels=[3, 4]))
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".py", ".safetensors"}


LOAD = """
import sys, numpy, torch, cm_diffusers
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(0), "class_labels": [3, 4]}
    numpy.save(folder + "/images.npy", pipe(output_type="pt", **arguments).images.numpy())
"""


def test_saved_pipelines_make_the_same_images_in_a_new_process(make_kind, tmp_path):
    expected, folders = {}, {}
    for kind in KINDS:
        folders[kind] = tmp_path / kind
        pipe = make_kind(kind)
        pipe.save_pretrained(folders[kind])
        expected[kind] = images(pipe, class_labels=[3, 4])
    subprocess.run([sys.executable, "-c", LOAD, *folders.values()], check=True)
    for kind in KINDS:
        assert (np.load(folders[kind] / "images.npy") == expected[kind].numpy()).all(), kind


def test_usual_numbers_of_steps(make_kind):
    for kind in KINDS:
        pipe = make_kind(kind)
        assert pipe.default_steps == ((18,) if kind in DIFFUSION else (1, 2))
        usual = images(pipe, class_labels=1, num_inference_steps=pipe.default_steps[0])
        plain = pipe(class_labels=1, generator=generator(), output_type="pt").images
        assert torch.equal(plain, usual)


def test_repeatable_and_different_for_another_seed(pipe):
    first = images(pipe, batch_size=2)
    assert torch.equal(images(pipe, batch_size=2), first)
    assert not torch.equal(images(pipe, batch_size=2, generator=generator(1)), first)


def test_global_generator_is_used_only_without_one(pipe):
    state = torch.get_rng_state()
    images(pipe, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first = images(pipe, batch_size=2, generator=None)
    torch.manual_seed(5)
    assert torch.equal(images(pipe, batch_size=2, generator=None), first)


@pytest.mark.parametrize("labels", [[4, 4, 7], None])
def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(pipe, labels):
    together = images(pipe, generator=[generator(i) for i in range(3)], class_labels=labels)
    for i in range(3):
        alone = images(pipe, generator=[generator(i)], class_labels=labels and labels[i])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=5e-5)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_batch_of_one_noise_is_consistent(pipe):
    noise = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    arguments = {"class_labels": 2, "latents": noise}
    if 1 in pipe.default_steps:
        arguments["num_inference_steps"] = 1  # further steps add noise
    batch = images(pipe, **arguments)
    torch.testing.assert_close(batch[1:], batch[:1].expand(2, -1, -1, -1), rtol=0, atol=5e-5)


def test_tuple_and_object_hold_the_same(pipe):
    as_tuple = pipe(class_labels=1, generator=generator(), output_type="np", return_dict=False)
    as_object = pipe(class_labels=1, generator=generator(), output_type="np")
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert (as_tuple[0] == as_object.images).all() and (as_object[0] == as_object.images).all()


def test_latents_replace_the_noise_of_the_generator(pipe):
    shared = generator()
    noise = torch.randn(2, 1, 8, 8, generator=shared)
    assert torch.equal(
        images(pipe, latents=noise, generator=shared, class_labels=[1, 2]), images(pipe, class_labels=[1, 2])
    )


# --- labels


def test_forms_of_class_labels(pipe):
    expected = images(pipe, class_labels=[3, 3])
    assert torch.equal(images(pipe, class_labels=3, batch_size=2), expected)
    assert torch.equal(images(pipe, class_labels=torch.tensor([3, 3])), expected)
    assert torch.equal(images(pipe, class_labels=np.array([3, 3])), expected)
    assert torch.equal(images(pipe, class_labels=torch.tensor(3), batch_size=2), expected)
    assert not torch.equal(images(pipe, class_labels=[3, 4]), expected)


def test_labels_are_drawn_from_the_generator(pipe):
    seen = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    for seed in (0, 0, 1):
        images(pipe, batch_size=50, generator=generator(seed))
    first, again, other = seen[:: len(seen) // 3]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.int64 and len(first.unique()) > 5 and 0 <= first.min() <= first.max() < CLASSES


def test_an_unconditional_network_is_given_no_labels(make):
    pipe, seen = make(num_classes=None), []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("class_labels")), with_kwargs=True
    )
    images(pipe)
    assert set(seen) == {None}


# --- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": 10}, r"integers in \[0, 9\]"),
        ({"class_labels": [-1]}, r"integers in \[0, 9\]"),
        ({"class_labels": [0.5]}, r"integers in \[0, 9\]"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 1, 8, 8\), got \(1, 3, 8, 8\)"),
        ({"latents": torch.zeros(1, 1, 4, 8)}, r"latents must have the shape"),
        ({"output_type": "jpg"}, "output_type must be 'pil', 'np', 'pt' or 'latent', got 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "latents.*got.*prompt"),
        ({"batch_size": 3, "class_labels": [1, 2]}, "batch_size is 3, the number of class_labels is 2"),
        ({"batch_size": 3, "generator": [generator()]}, "the number of generators is 1"),
        ({"class_labels": [1, 2], "latents": torch.zeros(3, 1, 8, 8)}, "the batch of latents is 3"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
    ],
)
def test_errors_name_what_is_wrong(pipe, arguments, message):
    calls = []
    pipe.unet.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match=message):
        images(pipe, **arguments)
    assert not calls


def test_labels_for_an_unconditional_network_are_an_error(make):
    with pytest.raises(ValueError, match="unconditional"):
        images(make(num_classes=None), class_labels=1)


@pytest.mark.parametrize("channels", [2, 4])
def test_pil_images_of_odd_channels_are_an_error(make, channels):
    with pytest.raises(ValueError, match=f"{channels} channels have no PIL form"):
        images(make(channels=channels), output_type="pil")


# --- callback, progress bar, dtypes, offloading


def test_callback_sees_every_step(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append((step, float(timestep), sorted(tensors), tensors["latents"].shape))
        return tensors

    names = pipe._callback_tensor_inputs
    watched = images(
        pipe, num_inference_steps=3, class_labels=1,
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names,
    )  # fmt: skip
    levels = pipe.scheduler.timesteps[:: pipe.scheduler.order]
    assert len(levels) == 3
    assert seen == [(i, float(t), names, (1, 1, 8, 8)) for i, t in enumerate(levels)]
    assert torch.equal(watched, images(pipe, num_inference_steps=3, class_labels=1))


def test_callback_is_given_only_what_was_asked_for_and_may_return_nothing(pipe):
    seen = []
    plain = images(pipe, class_labels=1)
    assert torch.equal(
        images(pipe, class_labels=1, callback_on_step_end=lambda *args: seen.append(set(args[3]))), plain
    )
    assert seen == [{"latents"}] * STEPS


def test_callback_may_change_the_latents(pipe):
    def black_at_the_end(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] * 0 - 1} if step == STEPS - 1 else {}

    assert torch.equal(images(pipe, callback_on_step_end=black_at_the_end), torch.zeros(1, 1, 8, 8))

    def shift_one(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] + (step == STEPS - 2)}

    assert not torch.equal(images(pipe, class_labels=1, callback_on_step_end=shift_one), images(pipe, class_labels=1))


def test_progress_bar_can_be_configured(pipe, capsys):
    images(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="steps of a test")
    images(pipe)
    shown = capsys.readouterr().err
    assert "steps of a test" in shown and f"{STEPS}/{STEPS}" in shown


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks(pipe, dtype):
    arguments = {"class_labels": [1, 2], "latents": torch.randn(2, 1, 8, 8).to(dtype)}
    full = images(pipe, **arguments)
    pipe.to(dtype)
    half = images(pipe, **arguments)
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert (half - full).abs().mean() < 0.02
    picture = images(pipe, output_type="pil", **{**arguments})[0]
    assert picture.mode == "L"


def test_the_network_is_told_of_the_level_in_full_precision(pipe):
    # in bfloat16, 250 ln(sigma) would lose its last digits, and neighbouring levels would become equal
    pipe.to(torch.bfloat16)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    images(pipe)
    assert {label.dtype for label in seen} <= {torch.float32, torch.float64}


def test_models_are_freed_after_sampling_and_can_be_offloaded(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: freed.append(True))
    images(pipe)
    assert freed == [True]
    assert [name for name in pipe.components if isinstance(pipe.components[name], torch.nn.Module)] == ["unet"]
    assert pipe.model_cpu_offload_seq == "unet->vae"


def test_steps_have_no_gradient(pipe):
    assert not images(pipe).requires_grad


def test_every_argument_is_documented(pipe):
    parameters = set(inspect.signature(type(pipe).__call__).parameters) - {"self"}
    lines = [line.strip() for line in type(pipe).__call__.__doc__.splitlines()]
    assert parameters == {name for name in parameters if any(line.startswith(f"{name}: ") for line in lines)}
    assert {"generator", "latents", "output_type", "return_dict", "callback_on_step_end"} <= parameters


def test_a_pipeline_can_be_rebuilt_from_its_parts(pipe):
    again = type(pipe).from_pipe(pipe, unet=pipe.unet)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images(again, class_labels=1), images(pipe, class_labels=1))


def test_stock_scheduler_is_converted_only_where_it_is_one(tiny_unet):
    pipe = ConsistencyPipeline(tiny_unet(), CMStochasticIterativeScheduler(sigma_min=0.0, sigma_data=0.7))
    assert isinstance(pipe.scheduler, MultistepConsistencyScheduler)
    assert (pipe.scheduler.config.sigma_min, pipe.scheduler.config.sigma_data) == (0.0, 0.7)
    ours = MultistepConsistencyScheduler()
    assert ConsistencyPipeline(tiny_unet(), ours).scheduler is ours


def test_a_stock_scheduler_s_settings_given_by_position_are_kept(tiny_unet):
    config = ConsistencyPipeline(tiny_unet(), CMStochasticIterativeScheduler(18, 0.01, 40.0)).scheduler.config
    assert (config.num_train_timesteps, config.sigma_min, config.sigma_max) == (18, 0.01, 40.0)

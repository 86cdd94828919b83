"""Calls: threads and nested calls, interruption, arguments, schedulers, and pipelines that share parts."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConfigMixin,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config

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
from cm_diffusers.pipelines import name_classes
from tests.helpers.apple import without_float64


NOISE = {"prediction": "epsilon", "noise_schedule": {"beta_schedule": "linear"}}
KINDS = {
    "consistency": lambda network: ConsistencyPipeline(network, MultistepConsistencyScheduler()),
    "ctm": lambda network: CTMPipeline(network, CTMScheduler(gamma=0.7)),
    "denoising": lambda network: DenoisingPipeline(network, EDMEulerScheduler()),
    "flow": lambda network: DenoisingPipeline(network, EDMEulerScheduler(), prediction="flow", time_scale=1000.0),
    "epsilon": lambda network: DenoisingPipeline(network, EDMEulerScheduler(), **NOISE),
    "trigflow": lambda network: TrigFlowPipeline(network, TrigFlowScheduler()),
    "trigflow heun": lambda network: TrigFlowPipeline(network, TrigFlowScheduler(solver="heun")),
    "mean flow": lambda network: MeanFlowPipeline(network, FlowMatchEulerDiscreteScheduler(), time_scale=1000.0),
}
TWO_TIMES = ("ctm", "mean flow")


@pytest.fixture
def make(tiny_unet):
    def build(kind, **unet):
        network = tiny_unet(**unet)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        network = TwoTimeModel.from_network(network) if kind in TWO_TIMES else network
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return quiet(KINDS[kind](network))

    return build


@pytest.fixture(params=KINDS)
def pipe(request, make):
    return make(request.param)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(pipe, **arguments):
    arguments = {"num_inference_steps": 4, "class_labels": 1, "generator": generator(), **arguments}
    return pipe(output_type="pt", **arguments).images


# --- threads, and nested calls


def test_threads_that_share_a_pipeline_make_the_images_of_one(pipe):
    work = [{"num_inference_steps": 2 + seed % 3, "generator": seed, "class_labels": seed} for seed in range(6)]
    alone = [images(pipe, **arguments) for arguments in work]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda arguments: images(pipe, **arguments), 2 * work))
    for image, expected in zip(together, 2 * alone):
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


WAYS = [
    *[(kind, {}) for kind in KINDS],
    ("consistency", {"sigmas": [80.0, 2.0, 0.3]}),
    ("ctm", {"gamma": 0.0}),
    *[("denoising", {"solver": solver}) for solver in ("euler", "heun", "sde", "sde_2m")],
    ("denoising", {"s_churn": 4.0}),
    *[(kind, {"solver": "sde_2m"}) for kind in ("flow", "epsilon")],
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, way", WAYS, ids=str)
def test_eight_threads_with_fifty_calls_each_make_the_images_of_one(make, kind, way):
    pipe, seeds = make(kind), range(8 * 50)
    work = [{"generator": seed, "class_labels": seed % 10, **way} for seed in seeds]
    if "sigmas" in way:
        work = [{**arguments, "num_inference_steps": None} for arguments in work]
    else:
        work = [{**arguments, "num_inference_steps": 2 + seed % 3} for seed, arguments in zip(seeds, work)]
    alone = [images(pipe, **arguments) for arguments in work]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda arguments: images(pipe, **arguments), work))
    assert all(torch.equal(image, expected) for image, expected in zip(together, alone))


def test_a_call_within_a_call_disturbs_neither(pipe):
    other = quiet(type(pipe)(**pipe.components))
    expected, inner = images(pipe), []

    def nested(p, step, timestep, tensors):
        if step == 1:
            inner.extend(images(one, num_inference_steps=2) for one in (p, other))

    assert torch.equal(images(pipe, callback_on_step_end=nested), expected)
    assert all(torch.equal(image, images(pipe, num_inference_steps=2)) for image in inner)


def test_a_callback_sees_the_levels_of_its_own_call(pipe):
    seen = []

    def nested(p, step, timestep, tensors):
        if step == 1:
            images(p, num_inference_steps=2)
            thread = threading.Thread(target=images, args=(p,), kwargs={"num_inference_steps": 3})
            thread.start()
            thread.join()
        seen.append(p.scheduler.timesteps.tolist())

    images(pipe, callback_on_step_end=nested)
    after = pipe.scheduler.timesteps.tolist()
    images(pipe)
    assert seen == 4 * [pipe.scheduler.timesteps.tolist()] and after == seen[0]


def test_a_call_keeps_what_the_scheduler_is_told_meanwhile(make):
    pipe = make("consistency")
    own = pipe.scheduler

    def tell(p, step, timestep, tensors):
        own.register_to_config(default_sigmas={"2": [50.0, 0.5]})

    images(pipe, callback_on_step_end=tell)
    images(pipe, num_inference_steps=2)
    assert pipe.scheduler is own and own.sigmas[:2].tolist() == [50.0, 0.5]


# --- interruption


def test_a_callback_can_stop_its_call_and_only_that(pipe):
    steps = []

    def stop(p, step, timestep, tensors):
        steps.append(step)
        if step == 0:
            images(p, callback_on_step_end=lambda *args: setattr(p, "_interrupt", True))
        if step == 2:
            p._interrupt = True
            assert p.interrupt

    stopped = images(pipe, callback_on_step_end=stop)
    assert steps == [0, 1, 2] and stopped.shape == (1, 1, 8, 8)
    assert not pipe.interrupt
    watched = images(pipe, callback_on_step_end=lambda *args: steps.append(args[1]))
    assert steps == [0, 1, 2, 0, 1, 2, 3] and torch.equal(watched, images(pipe))


def test_another_thread_can_stop_the_calls_in_progress(make):
    pipe, steps = make("consistency"), []

    def wait(p, step, timestep, tensors):
        steps.append(step)
        thread = threading.Thread(target=setattr, args=(p, "_interrupt", True))
        thread.start()
        thread.join()

    images(pipe, callback_on_step_end=wait)
    assert steps == [0]
    images(pipe, callback_on_step_end=lambda *args: steps.append(args[1]))
    assert steps == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("changed", [torch.zeros(1), {"latent": 0}])
def test_what_a_callback_returns_is_not_ignored(make, changed):
    with pytest.raises(ValueError, match="must return None or a dict with some of .*latents.*, got"):
        images(make("consistency"), callback_on_step_end=lambda *args: changed)


# --- arguments


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint16", "int64"])
def test_labels_of_any_integer_type(make, dtype):
    pipe = make("consistency")
    expected = images(pipe, class_labels=[1, 2])
    assert torch.equal(images(pipe, class_labels=np.array([1, 2], dtype=dtype)), expected)
    assert torch.equal(images(pipe, class_labels=list(np.array([1, 2], dtype=dtype))), expected)
    if dtype != "uint16":
        assert torch.equal(images(pipe, class_labels=torch.tensor([1, 2], dtype=getattr(torch, dtype))), expected)


def test_seeds_counts_and_latents_in_other_forms(pipe):
    assert torch.equal(images(pipe, generator=3), images(pipe, generator=generator(3)))
    each = images(pipe, generator=[generator(3), generator(4)])
    for seeds in ([3, 4], (3, np.int64(4)), np.array([3, 4]), range(3, 5)):
        assert torch.equal(images(pipe, generator=seeds), each)
    assert torch.equal(images(pipe, batch_size=np.int64(2)), images(pipe, batch_size=2))
    assert torch.equal(images(pipe, num_inference_steps=np.int32(3)), images(pipe, num_inference_steps=3))
    noise = torch.randn(2, 1, 8, 8)
    expected = images(pipe, latents=noise)
    assert torch.equal(images(pipe, latents=noise.numpy()), expected)
    assert torch.equal(images(pipe, latents=noise.double().numpy()), expected)


@pytest.mark.parametrize("kind", ["consistency", "ctm", "trigflow", "trigflow heun", "mean flow"])
def test_levels_in_other_forms(make, kind):
    pipe = make(kind)
    one, two = ({"num_inference_steps": None, "sigmas": sigmas} for sigmas in ([40.0], [40.0, 2.0]))
    for sigmas in (40, 40.0, np.float32(40), torch.tensor(40), (40,)):
        assert torch.equal(images(pipe, **{**one, "sigmas": sigmas}), images(pipe, **one))
    for sigmas in ((40, 2), np.array([40, 2]), torch.tensor([40, 2]), torch.tensor([40.0, 2.0]).bfloat16()):
        assert torch.equal(images(pipe, **{**two, "sigmas": sigmas}), images(pipe, **two))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be an integer of at least 1, got -1"),
        ({"batch_size": 2.0}, "batch_size must be an integer of at least 1, got 2.0"),
        ({"batch_size": True}, "batch_size must be an integer"),
        ({"batch_size": "2"}, "batch_size must be an integer of at least 1, got '2'"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be an integer.* got 2.5"),
        ({"num_inference_steps": "4"}, "num_inference_steps must be an integer.* got '4'"),
        ({"generator": -1}, "generator must be .*a seed .*got -1"),
        ({"generator": 0.5}, "generator must be .* got 0.5"),
        ({"generator": "cpu"}, "generator must be .* got 'cpu'"),
        ({"generator": []}, r"generator must be .* got \[\]"),
        ({"generator": [generator(), None]}, "generator must be .* got None"),
        ({"class_labels": []}, r"class_labels must be integers in \[0, 9\], got \[\]"),
        ({"class_labels": [True]}, r"class_labels must be integers in \[0, 9\]"),
        ({"class_labels": [[1, 2]]}, r"class_labels must be integers in \[0, 9\]"),
        ({"class_labels": np.array([1.0])}, r"class_labels must be integers in \[0, 9\]"),
        ({"class_labels": np.array([200], dtype=np.uint8)}, r"class_labels must be integers in \[0, 9\]"),
        ({"latents": [[0.0]]}, "latents must be a tensor or an array of floats, got list"),
        ({"latents": np.zeros((1, 1, 8, 8), dtype=int)}, "latents must be a tensor or an array of floats, got int64"),
        ({"latents": torch.full((1, 1, 8, 8), math.nan)}, "latents must be finite"),
        ({"latents": np.zeros((1, 8, 8, 1))}, r"latents must have the shape \(1, 1, 8, 8\), got \(1, 8, 8, 1\)"),
        ({"output_type": None}, "output_type must be .* got None"),
        ({"output_type": ["np"]}, "output_type must be"),
        ({"callback_on_step_end": 1}, "callback_on_step_end must be a function or None, got 1"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list with some of .* got .'latents'"),
    ],
)
def test_arguments_that_can_not_be_meant_are_named(pipe, arguments, message):
    pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**{"num_inference_steps": 4, "class_labels": 1, **arguments})


@pytest.mark.parametrize("kind", ["consistency", "ctm", "trigflow", "mean flow"])
@pytest.mark.parametrize("sigmas", ["80", ["80"], [None], [[80.0]], [True], {80.0: 1}])
def test_levels_that_are_no_numbers(make, kind, sigmas):
    with pytest.raises(ValueError, match="sigmas must be a number or a list of numbers"):
        images(make(kind), num_inference_steps=None, sigmas=sigmas)


@pytest.mark.parametrize("argument", ["s_churn", "s_tmin", "s_tmax", "s_noise"])
def test_churn_that_is_no_number(make, argument):
    with pytest.raises(ValueError, match=f"{argument} must be a number, got 'a'"):
        images(make("denoising"), **{"s_churn": 1.0, argument: "a"})


def test_levels_of_a_jump_that_are_no_numbers(make):
    pipe, sample = make("ctm"), torch.zeros(2, 1, 8, 8)
    levels = [1.0, 2.0]
    expected = pipe.jump(sample, torch.tensor(levels), 0.5, 1)
    assert torch.equal(pipe.jump(sample, levels, np.float64(0.5), 1), expected)
    for bad in ("1", None, [], [None]):
        with pytest.raises(ValueError, match="sigma_from must be"):
            pipe.jump(sample, bad, 0.5, 1)
    with pytest.raises(ValueError, match="gamma must be a number, got 'a'"):
        images(pipe, gamma="a")
    for count in (2.5, "3", None):
        with pytest.raises(ValueError, match="num_images must be"):
            pipe.interpolate(torch.zeros(2, 1, 8, 8), 1, num_images=count)


def test_latents_without_labels_ask_for_the_classes(pipe):
    with pytest.raises(ValueError, match=r"latents were given without class_labels.*integers in \[0, 9\]"):
        images(pipe, latents=torch.randn(2, 1, 8, 8), class_labels=None)
    images(pipe, latents=torch.randn(2, 1, 8, 8), class_labels=[1, 2])


def test_a_round_trip_names_its_class_and_needs_none_where_there_are_none(make):
    pictures = torch.rand(2, 1, 8, 8)
    pipe = make("ctm")
    name_classes(pipe.unet, {3: "three"})
    noise = pipe.invert(pictures, "three", num_inference_steps=2)
    assert torch.equal(noise, pipe.invert(pictures, 3, num_inference_steps=2))
    with pytest.raises(ValueError, match="class_labels"):
        pipe(latents=noise, gamma=0)
    pipe(latents=noise, gamma=0, class_labels="three")
    pipe = make("ctm", num_classes=None)
    pipe(latents=pipe.invert(pictures, num_inference_steps=2), gamma=0)


# --- schedulers and parts


@pytest.mark.parametrize("cls", [LCMScheduler, DDIMScheduler, DDPMScheduler])
def test_a_foreign_scheduler_is_refused_by_its_name_when_given_and_when_assigned(pipe, cls):
    message = f"{type(pipe).__name__} needs an? {pipe._schedulers[0]}.* not an? {cls.__name__}"
    with pytest.raises(ValueError, match=message):
        type(pipe)(pipe.unet, cls())
    kept = pipe.scheduler
    with pytest.raises(ValueError, match=message):
        pipe.scheduler = cls()
    with pytest.raises(ValueError, match=message):
        pipe.register_modules(scheduler=cls())
    assert pipe.scheduler is kept


def test_a_hint_says_who_samples_with_a_scheduler_of_the_library(make):
    network = make("consistency").unet
    with pytest.raises(ValueError, match="It belongs to a diffusion or flow model: use DenoisingPipeline"):
        ConsistencyPipeline(network, EDMEulerScheduler())
    with pytest.raises(ValueError, match="It belongs to a TrigFlow model: use TrigFlowPipeline"):
        DenoisingPipeline(network, TrigFlowScheduler())
    with pytest.raises(ValueError, match="takes only one.*DenoisingPipeline with prediction='flow'"):
        MeanFlowPipeline(network, FlowMatchEulerDiscreteScheduler())


def test_an_assigned_scheduler_is_named_in_the_saved_index(make, tmp_path):
    pipe = make("consistency")
    pipe.scheduler = CMStochasticIterativeScheduler(sigma_min=0.01)
    assert isinstance(pipe.scheduler, MultistepConsistencyScheduler)
    pipe.save_pretrained(tmp_path)
    again = ConsistencyPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is MultistepConsistencyScheduler and again.scheduler.config.sigma_min == 0.01


def test_pipelines_of_the_same_parts_make_the_same_images(pipe, tmp_path):
    expected = images(pipe)
    copies = [type(pipe)(**pipe.components), type(pipe)(pipe.unet, pipe.scheduler), type(pipe).from_pipe(pipe)]
    pipe.save_pretrained(tmp_path)
    scheduler = type(pipe.scheduler).from_pretrained(tmp_path, subfolder="scheduler")
    for copy in [*copies, type(pipe)(pipe.unet, scheduler)]:
        assert torch.equal(images(quiet(copy)), expected)
    # loaded weights can have addresses at which some kernels round differently
    loaded = images(quiet(DiffusionPipeline.from_pretrained(tmp_path)))
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)


class PlainAutoencoder(ModelMixin, ConfigMixin):
    """An autoencoder whose images are its latents, in its own dtype."""

    @register_to_config
    def __init__(self, scaling_factor=None, shift_factor=None, block_out_channels=(1,), out_channels=1):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def decode(self, latents, return_dict=True):
        return (self.one * latents,)


@pytest.mark.parametrize(
    "config, image",
    [({}, 0.3), ({"scaling_factor": 0.5}, 0.6), ({"scaling_factor": 0.5, "shift_factor": -0.25}, 0.35)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_decoded_as_the_autoencoder_s_config_says_into_float32(make, config, image, dtype):
    pipe = make("consistency")
    pipe = quiet(ConsistencyPipeline(pipe.unet, pipe.scheduler, PlainAutoencoder(**config)))
    pipe.vae.to(dtype)
    decoded = pipe.decode(torch.full((2, 1, 8, 8), 0.3))
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(
        decoded, torch.full((2, 1, 8, 8), image), rtol=0, atol=1e-6 if dtype.itemsize > 2 else 2e-3
    )
    made = images(pipe)
    assert made.dtype == torch.float32 and made.shape == (1, 1, 8, 8)


def test_from_pipe_keeps_the_autoencoder(make):
    from diffusers import AutoencoderKL

    pipe = make("denoising", channels=4)
    pipe = quiet(DenoisingPipeline(pipe.unet, pipe.scheduler, vae=AutoencoderKL(block_out_channels=(32,))))
    again = DenoisingPipeline.from_pipe(pipe)
    assert again.vae is pipe.vae


def test_no_saved_file_names_the_folder_that_a_part_came_from(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    again = DiffusionPipeline.from_pretrained(tmp_path / "first")
    came_from = [config for config in (again.config, again.unet.config) if str(tmp_path) in str(config)]
    again.save_pretrained(tmp_path / "second")
    texts = [path.read_text() for path in (tmp_path / "second").rglob("*") if path.suffix in (".json", ".py")]
    assert came_from and len(texts) >= 3 and not any(str(tmp_path) in text for text in texts)
    assert all(str(tmp_path) in str(config) for config in came_from)  # saving has not changed the configs


def test_a_scheduler_of_another_prediction_is_refused(make):
    flow, edm = make("flow"), make("denoising")
    with pytest.raises(ValueError, match="a network with prediction='flow', and this one's is 'edm'"):
        edm.scheduler = flow.scheduler
    with pytest.raises(ValueError, match="a network with prediction='flow', and this one's is 'epsilon'"):
        DenoisingPipeline(flow.unet, flow.scheduler, **NOISE)
    flow.scheduler = EDMEulerScheduler(sigma_max=50.0)  # its config has no prediction
    again = quiet(DenoisingPipeline(**flow.components))
    assert again.config.prediction == "flow" and torch.equal(images(again), images(flow))


def test_one_scheduler_may_serve_networks_of_several_predictions(make):
    network, scheduler = make("denoising").unet, EDMEulerScheduler()
    pipes = [DenoisingPipeline(network, scheduler, prediction=name) for name in ("edm", "flow")]
    assert [pipe.config.prediction for pipe in pipes] == ["edm", "flow"]
    assert not torch.equal(*(images(quiet(pipe)) for pipe in pipes))
    assert "_network" not in scheduler.config


def test_every_pipeline_samples_what_it_loads_or_refuses_it(make, tmp_path):
    """All pairs of a saved model and a pipeline class."""
    stock = {
        "stock consistency": ConsistencyModelPipeline(make("consistency").unet, CMStochasticIterativeScheduler()),
        "stock diffusion": DDPMPipeline(make("denoising", num_classes=None).unet, DDPMScheduler()),
    }
    loaded = set()
    for kind in [*KINDS, *stock]:
        saved = stock.get(kind) or make(kind)
        saved.save_pretrained(tmp_path / kind)
        for cls in (ConsistencyPipeline, CTMPipeline, DenoisingPipeline, MeanFlowPipeline, TrigFlowPipeline):
            try:
                pipe = quiet(cls.from_pretrained(tmp_path / kind))
            except ValueError as error:
                assert cls.__name__ in str(error)
                continue
            loaded.add((kind, cls.__name__))
            asked = {"class_labels": 1, "num_inference_steps": 18 if cls is DenoisingPipeline else 2}
            expected, found = (
                one(output_type="np", generator=generator(), **asked).images for one in (quiet(saved), pipe)
            )
            near = 0.05 if kind == "trigflow heun" else 1e-5  # its Heun's method is in angles, not in levels
            assert np.abs(found - expected).mean() < near, (kind, cls)
    own = {(kind, type(make(kind)).__name__) for kind in KINDS}
    assert loaded == own | {
        ("stock consistency", "ConsistencyPipeline"), ("trigflow heun", "DenoisingPipeline")
    }  # fmt: skip


def test_a_trigflow_teacher_loaded_as_a_denoiser_is_the_same_denoiser(make, tmp_path):
    make("trigflow heun").save_pretrained(tmp_path / "teacher")
    pipe = quiet(DenoisingPipeline.from_pretrained(tmp_path / "teacher"))
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor(1.7), torch.tensor([1, 2])
    t = (sigma / 0.5).atan()
    velocity = 0.5 * pipe.unet(x * t.cos() / 0.5, t, class_labels=labels).sample
    exact = t.cos() * x * t.cos() - t.sin() * velocity
    torch.testing.assert_close(pipe.denoise(x, sigma, labels), exact, rtol=0, atol=1e-5)
    pipe.save_pretrained(tmp_path / "again")
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path / "again"))
    assert again.config.prediction == "trigflow" and torch.equal(images(again), images(pipe))


def test_fp8_storage(make):
    for kind in KINDS:
        pipe = make(kind)
        expected = images(pipe)
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert (images(pipe) - expected).abs().mean() < 0.1, kind


def test_images_on_a_device_without_float64_are_those_of_the_cpu(pipe, monkeypatch):
    expected = images(pipe)
    with without_float64(monkeypatch, pipe.unet) as device:
        assert pipe.device == device
        torch.testing.assert_close(images(pipe).cpu(), expected, rtol=0, atol=1e-4)

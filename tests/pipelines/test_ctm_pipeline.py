import inspect
import math

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConfigMixin,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from cm_diffusers import (
    ConsistencyPipeline,
    CTMPipeline,
    CTMScheduler,
    DenoisingPipeline,
    MultistepConsistencyScheduler,
    TwoTimeModel,
)
from cm_diffusers.core.solvers import euler_step, heun_step


STD = 0.3


class GaussianTrajectory(ModelMixin, ConfigMixin):
    """A network whose jumps and denoiser are exact for data N(mean of the class, data_std^2), in closed form."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=1, num_class_embeds=None, data_std=STD, sigma_data=0.5, angle=False):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))  # gives the model a dtype and a device

    def mean(self, class_labels):
        return 0.0 if class_labels is None else (0.1 * class_labels).reshape(-1, 1, 1, 1)

    def sigma(self, label):
        label = torch.as_tensor(label).double().reshape(-1, 1, 1, 1)
        return label.tan() * self.config.sigma_data if self.config.angle else (label / 250).exp()

    def trajectory(self, x, t, s, class_labels=None):
        """The point at level `s` on the trajectory through `x` at level `t`."""
        mean, variance = self.mean(class_labels), self.config.data_std**2
        return mean + (x - mean) * ((s * s + variance) / (t * t + variance)) ** 0.5

    def denoised(self, x, t, class_labels=None):
        variance = self.config.data_std**2
        return (variance * x + t**2 * self.mean(class_labels)) / (t**2 + variance)

    def forward(self, sample, timestep, target_timestep, class_labels=None, return_dict=True):
        t, s, sigma_data = self.sigma(timestep), self.sigma(target_timestep), self.config.sigma_data
        norm = (t**2 + sigma_data**2).sqrt()
        x = sample.double() * norm
        if torch.equal(t, s):
            g = self.denoised(x, t, class_labels)
        else:
            g = (self.trajectory(x, t, s, class_labels) - s / t * x) / (1 - s / t)
        output = (g - sigma_data**2 / norm**2 * x) / (t * sigma_data / norm)
        output = output.to(sample.dtype) + self.zero
        return UNet2DOutput(output) if return_dict else (output,)


def ctm(network, **config):
    pipe = CTMPipeline(network, CTMScheduler(**config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def random_network(tiny_unet):
    """A function that makes two-time networks with random weights."""

    def make(**unet):
        network = TwoTimeModel.from_network(tiny_unet(**unet), target_time_scale=1 / 250)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return network

    return make


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def in_pixels(sample):
    return (sample / 2 + 0.5).clamp(0, 1)


def in_steps(pipe, noise, **arguments):
    return pipe(latents=noise, output_type="pt", **arguments).images


# --- gamma sampling


@pytest.mark.parametrize(
    "steps",
    [{}, *({"num_inference_steps": n} for n in (1, 2, 7, 39)), {"sigmas": [80, 0.8]}, {"sigmas": [80, 5, 1, 0.003]}],
)
def test_any_jumps_of_the_exact_model_make_the_same_images(steps):
    pipe, noise, labels = ctm(GaussianTrajectory(num_class_embeds=5)), torch.randn(3, 1, 4, 4), torch.tensor([0, 2, 4])
    exact = pipe.unet.trajectory(80 * noise, 80, 0.002, labels)
    images = in_steps(pipe, noise, class_labels=labels, **steps)
    torch.testing.assert_close(images, in_pixels(exact), rtol=0, atol=5e-6)


def test_sampling_starts_from_noise_of_the_first_level():
    pipe, noise = ctm(GaussianTrajectory()), torch.randn(2, 1, 4, 4)
    exact = pipe.unet.trajectory(4 * noise, 4, 0.002)
    torch.testing.assert_close(in_steps(pipe, noise, sigmas=[4.0]), in_pixels(exact), rtol=0, atol=2e-6)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_the_exact_model_keeps_the_spread_of_the_data_for_any_gamma(gamma):
    pipe = ctm(GaussianTrajectory(sample_size=128, data_std=0.2))
    images = pipe(sigmas=[80, 2, 0.4], gamma=gamma, generator=generator(), output_type="pt").images
    assert (2 * images - 1).std().item() == pytest.approx(0.2, rel=0.03)


def test_a_call_is_a_plain_loop_of_the_scheduler(random_network):
    network, noise, labels = random_network(), torch.randn(2, 1, 8, 8), torch.tensor([3, 8])
    arguments = {"class_labels": labels, "num_inference_steps": 4, "gamma": 0.6}
    images = in_steps(ctm(network), noise, generator=generator(), **arguments)
    scheduler, draws = CTMScheduler(), generator()
    scheduler.set_timesteps(4, gamma=0.6)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t, s in zip(scheduler.timesteps, scheduler.target_timesteps):
            output = network(scheduler.scale_model_input(x, t), t, target_timestep=s, class_labels=labels).sample
            x = scheduler.step(output, t, x, draws).prev_sample
    assert torch.equal(images, in_pixels(x)) and images.std() > 0.01


def test_gamma_0_draws_no_noise_and_another_gamma_does(random_network):
    pipe, noise = ctm(random_network(num_classes=None)), torch.randn(1, 1, 8, 8)
    images = {
        (gamma, seed): in_steps(pipe, noise, num_inference_steps=3, gamma=gamma, generator=generator(seed))
        for gamma in (None, 0.0, 0.5)
        for seed in (0, 1)
    }
    assert torch.equal(images[0.0, 0], images[0.0, 1]) and torch.equal(images[None, 0], images[0.0, 0])
    assert not torch.equal(images[0.5, 0], images[0.5, 1])
    configured = ctm(pipe.unet, gamma=0.5)
    assert torch.equal(in_steps(configured, noise, num_inference_steps=3, generator=generator()), images[0.5, 0])


def test_gamma_1_is_multistep_consistency_sampling(random_network):
    network, config = random_network(num_classes=None), {"time_label": "angle", "sigma_min": 0.0}
    ours, noise = ctm(network, **config), torch.randn(2, 1, 8, 8)

    class ToZero(ModelMixin, ConfigMixin):
        config = network.config

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            return self.network(sample, timestep, 0.0, class_labels, return_dict)

    theirs = ConsistencyPipeline(ToZero(), MultistepConsistencyScheduler(**config))
    theirs.set_progress_bar_config(disable=True)
    for steps in ({}, {"num_inference_steps": 4}, {"sigmas": [80, 0.8]}):
        images = in_steps(ours, noise, generator=generator(), gamma=1.0, **steps)
        expected = in_steps(theirs, noise, generator=generator(), **steps)
        torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)
        assert images.std() > 0.01


@pytest.mark.parametrize(
    "arguments, pairs",
    [
        ({"sigmas": [80, 0.8]}, [(80, 0.8), (0.8, 0.002)]),
        ({"sigmas": [80, 0.8], "gamma": 0.6}, [(80, 0.64), (0.8, 0.002)]),
        ({"sigmas": [80, 0.8], "gamma": 1}, [(80, 0.002), (0.8, 0.002)]),
        ({"sigmas": [80, 0.8], "solver": "euler"}, [(80, 80), (0.8, 0.8)]),
        ({"sigmas": [80, 0.8], "solver": "heun"}, [(80, 80), (0.8, 0.8), (0.8, 0.8), (0.002, 0.002)]),
        ({"num_inference_steps": 2, "solver": "euler"}, [(80, 80), (2.51521898, 2.51521898)]),
    ],
)
@pytest.mark.parametrize("angle", [False, True])
def test_the_network_is_given_both_times(arguments, pairs, angle):
    pipe, seen = ctm(GaussianTrajectory(angle=angle), time_label="angle" if angle else "log_sigma"), []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[1], kwargs["target_timestep"])), with_kwargs=True
    )
    pipe(**arguments)
    label = (lambda s: math.atan(2 * s)) if angle else (lambda s: 250 * math.log(s))
    expected = [label(s) for pair in pairs for s in pair]
    if arguments.get("num_inference_steps") == 2:  # the three Karras levels end with the floor
        expected[2:] = [label((80 ** (1 / 7) / 2 + 0.002 ** (1 / 7) / 2) ** 7)] * 2
    assert [float(label) for pair in seen for label in pair] == pytest.approx(expected, rel=1e-9)


# --- the ODE on the diagonal


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("n", [1, 2, 18])
def test_solvers_are_those_of_core(solver, n):
    pipe, noise, labels = ctm(GaussianTrajectory(num_class_embeds=5)), torch.randn(3, 1, 4, 4), torch.tensor([0, 2, 4])
    images = in_steps(pipe, noise, class_labels=labels, num_inference_steps=n, solver=solver)
    sigmas, x = torch.from_numpy(pipe.scheduler.karras_sigmas(n + 1)), noise.double() * 80
    for now, then in zip(sigmas[:-1, None].expand(-1, 3), sigmas[1:, None].expand(-1, 3)):
        x = (heun_step if solver == "heun" else euler_step)(
            lambda x, sigma: pipe.unet.denoised(x, sigma.reshape(-1, 1, 1, 1), labels), x, now, then
        )
    torch.testing.assert_close(images.double(), in_pixels(x), rtol=0, atol=5e-6)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_solvers_are_those_of_a_denoising_pipeline(random_network, solver):
    network, noise = random_network(num_classes=None), torch.randn(2, 1, 8, 8)

    class Diagonal(ModelMixin, ConfigMixin):
        config = network.config

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            return self.network(sample, timestep, timestep, class_labels, return_dict)

    theirs = DenoisingPipeline(Diagonal(), EDMEulerScheduler(sigma_min=0.01, final_sigmas_type="sigma_min"))
    theirs.set_progress_bar_config(disable=True)
    expected = in_steps(theirs, noise, num_inference_steps=6, solver=solver)
    theirs_last = float(theirs.scheduler.sigmas[-2])
    ours = ctm(network, sigma_min=theirs_last)  # theirs ends with a step from this level to itself
    images = in_steps(ours, noise, num_inference_steps=5, solver=solver)
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    assert images.std() > 0.01


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_orders_of_the_solvers(solver, order):
    pipe, noise = ctm(GaussianTrajectory(data_std=0.2)), torch.randn(4, 1, 4, 4)
    exact, errors = in_pixels(pipe.unet.trajectory(80 * noise, 80, 0.002)), []
    for n in (18, 36):
        errors.append((in_steps(pipe, noise, num_inference_steps=n, solver=solver) - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.5)


def test_the_ode_down_to_zero_itself():
    network = GaussianTrajectory(angle=True, data_std=0.2)
    pipe, noise = ctm(network, time_label="angle", sigma_min=0.0), torch.randn(2, 1, 4, 4)
    exact = in_pixels(network.trajectory(80 * noise, 80, 0.0))
    for solver in ("euler", "heun"):
        error = in_steps(pipe, noise, num_inference_steps=60, solver=solver) - exact
        assert error.abs().max() < (0.005 if solver == "heun" else 0.05)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_callbacks_of_the_solvers_see_what_the_denoiser_says(solver):
    pipe, noise, seen = ctm(GaussianTrajectory()), torch.randn(2, 1, 4, 4), []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, float(timestep), tensors))

    in_steps(
        pipe, noise, num_inference_steps=4, solver=solver,
        callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
    )  # fmt: skip
    assert [(step, timestep) for step, timestep, _ in seen] == list(enumerate(pipe.scheduler.timesteps.tolist()))
    starts = [80 * noise] + [tensors["latents"] for _, _, tensors in seen]
    for x, sigma, (_, _, tensors) in zip(starts, pipe.scheduler.sigmas, seen):
        torch.testing.assert_close(tensors["pred_original_sample"], pipe.unet.denoised(x, float(sigma)))


# --- jumps


@pytest.mark.parametrize("labels", [3, [0, 3], torch.tensor([4, 4])])
def test_jumps_of_the_exact_model(labels):
    pipe, x = ctm(GaussianTrajectory(num_class_embeds=5), upward=True), torch.randn(2, 1, 4, 4)
    each = torch.as_tensor(labels).reshape(-1).expand(2)
    for t, s in ((80, 0.002), (5, 1.5), (0.8, 0.79), (0.7, 60), (0.002, 80)):
        exact = pipe.unet.trajectory((x * t).double(), t, s, each)
        moved = pipe.jump(x * t, t, s, class_labels=labels)
        assert moved.dtype == torch.float32 and not moved.requires_grad
        torch.testing.assert_close(moved.double(), exact, rtol=2e-5, atol=2e-5)


def test_jumps_compose():
    pipe, x = ctm(GaussianTrajectory(), upward=True), 10 * torch.randn(2, 1, 4, 4)
    direct = pipe.jump(x, 10, 0.5)
    torch.testing.assert_close(pipe.jump(pipe.jump(x, 10, 2), 2, 0.5), direct, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pipe.jump(pipe.jump(x, 10, 70), 70, 0.5), direct, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pipe.jump(direct, 0.5, 10), x, rtol=1e-5, atol=1e-5)


def test_a_jump_to_where_one_is_changes_nothing_for_any_network(random_network):
    pipe, x = ctm(random_network(num_classes=None)), torch.randn(3, 1, 8, 8)
    for sigma in (0.002, 1 / 3, 80.0, torch.tensor([0.01, 0.7, 44.0])):
        assert torch.equal(pipe.jump(x, sigma, sigma), x)


def test_each_sample_may_jump_its_own_way(random_network):
    pipe, x = ctm(random_network()), torch.randn(3, 1, 8, 8)
    sigma, sigma_to, labels = torch.tensor([0.5, 7.0, 80.0]), torch.tensor([0.002, 7.0, 1.0]), torch.tensor([1, 2, 3])
    together = pipe.jump(x, sigma, sigma_to, labels)
    for i in range(3):
        alone = pipe.jump(x[i : i + 1], float(sigma[i]), float(sigma_to[i]), labels[i])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    assert torch.equal(together[1], x[1]) and not torch.equal(together[0], x[0])


def test_jumps_of_half_precision_networks_are_float32(random_network):
    pipe, x = ctm(random_network(num_classes=None)), torch.randn(1, 1, 8, 8)
    full = pipe.jump(x, 1.0, 0.2)
    pipe.to(torch.bfloat16)
    half = pipe.jump(x.to(torch.bfloat16), 1.0, 0.2)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.05)


def test_a_level_in_float32_is_the_level_itself():
    """float32 rounds 0.1 up. A jump from 0.1 to it is not refused as upward, but one to a 1e-5 higher level is."""
    pipe, x = ctm(GaussianTrajectory()), torch.randn(2, 1, 4, 4)
    assert float(torch.tensor(0.1)) > 0.1
    for same in (torch.tensor(0.1), torch.tensor([0.1, 0.1])):
        torch.testing.assert_close(pipe.jump(x, 0.1, same), x, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="higher levels"):
        pipe.jump(x, 0.1, 0.1 * (1 + 1e-5))


# --- inversion


def images_of(pipe, labels=None, n=3):
    x0 = pipe.unet.mean(labels) + STD * torch.randn(n, *pipe.sample_shape)
    return in_pixels(x0.clamp(-1, 1))


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("again", [1, 3])
def test_inversion_by_jumps_and_sampling_are_a_round_trip(steps, again):
    pipe, labels = ctm(GaussianTrajectory(num_class_embeds=5), upward=True), torch.tensor([0, 2, 4])
    images = images_of(pipe, labels)
    noise = pipe.invert(images, labels, num_inference_steps=steps)
    exact = pipe.unet.trajectory(2 * images - 1, 0.002, 80, labels) / 80
    torch.testing.assert_close(noise, exact, rtol=0, atol=2e-5)
    back = in_steps(pipe, noise, class_labels=labels, num_inference_steps=again)
    torch.testing.assert_close(back, images, rtol=0, atol=1e-5)


def test_images_of_pillow_and_arrays_are_inverted_as_tensors_are():
    pipe = ctm(GaussianTrajectory(), upward=True)
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    expected = pipe.invert(torch.from_numpy(pixels / 255).float()[None, None])
    for images in (Image.fromarray(pixels), (pixels / 255)[None, ..., None]):
        assert torch.equal(pipe.invert(images), expected)


def test_inversion_gives_noise_of_the_unit_normal_scale():
    pipe = ctm(GaussianTrajectory(sample_size=64), upward=True)
    noise = pipe.invert(images_of(pipe, n=1))
    assert noise.dtype == torch.float32 and noise.shape == (1, 1, 64, 64)
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_inversion_by_the_ode_converges_to_a_round_trip():
    pipe = ctm(GaussianTrajectory())
    images, errors = images_of(pipe), []
    exact = pipe.unet.trajectory(2 * images - 1, 0.002, 80) / 80
    for n in (18, 36):
        noise = pipe.invert(images, num_inference_steps=n)
        errors.append((noise - exact).abs().max().item())
        back = in_steps(pipe, noise, num_inference_steps=n, solver="heun")
        assert (back - images).abs().max() < 0.02
    assert torch.equal(pipe.invert(images), pipe.invert(images, num_inference_steps=18, solver="heun"))
    assert errors[0] < 0.1 and math.log2(errors[0] / errors[1]) > 1.5


def test_inversion_from_zero_itself():
    class NearZero(GaussianTrajectory):  # the parent's output has no value at level 0
        def forward(self, sample, timestep, target_timestep, class_labels=None, return_dict=True):
            labels = (label.clamp(min=1e-6) for label in (timestep, target_timestep))
            return super().forward(sample, *labels, class_labels, return_dict)

    pipe = ctm(NearZero(angle=True), time_label="angle", sigma_min=0.0, upward=True)
    images = images_of(pipe)
    for arguments, error in (({}, 2e-5), ({"solver": "heun", "num_inference_steps": 40}, 0.02)):
        noise = pipe.invert(images, **arguments)
        torch.testing.assert_close(in_steps(pipe, noise), images, rtol=0, atol=error)


@pytest.mark.parametrize("solver", ["jump", "heun"])
def test_inversion_to_another_level(solver):
    pipe = ctm(GaussianTrajectory(), upward=True)
    images = images_of(pipe)
    noise = pipe.invert(images, sigma_max=3.0, num_inference_steps=20, solver=solver)
    torch.testing.assert_close(in_steps(pipe, noise, sigmas=[3.0]), images, rtol=0, atol=0.01)


def test_the_default_solver_of_inversion_suits_the_model(random_network):
    seen = []
    for upward, calls in ((True, 1), (False, 36)):
        pipe = ctm(random_network(num_classes=None), upward=upward)
        pipe.unet.register_forward_hook(lambda *args: seen.append(1))
        pipe.invert(torch.rand(2, 1, 8, 8))
        assert len(seen) == calls
        seen.clear()


def test_the_network_is_freed_after_jumps_and_inversions(monkeypatch):
    freed, pipe = [], ctm(GaussianTrajectory())
    monkeypatch.setattr(CTMPipeline, "maybe_free_model_hooks", lambda self: freed.append(True))
    pipe.jump(torch.zeros(1, 1, 4, 4), 1.0, 0.5)
    assert freed == [True]
    pipe.invert(torch.zeros(1, 1, 4, 4))
    assert freed == [True, True]


# --- interpolation


@pytest.fixture
def gaussian():
    """An exact model of three classes with 16 x 16 pixels that can jump upward."""
    return ctm(GaussianTrajectory(sample_size=16, num_class_embeds=3), upward=True)


@pytest.mark.parametrize("label", [0, [2, 2]])
@pytest.mark.parametrize("steps", [None, 3])
def test_the_ends_of_an_interpolation_are_the_images(gaussian, label, steps):
    images = images_of(gaussian, torch.as_tensor(label).reshape(-1).expand(2), n=2)
    made = gaussian.interpolate(images, label, num_images=5, num_inference_steps=steps, output_type="pt").images
    assert made.shape == (5, 1, 16, 16)
    torch.testing.assert_close(made[[0, 4]], images, rtol=0, atol=1e-5)


def test_the_middle_of_an_interpolation_is_that_of_the_arc(gaussian):
    network, images = gaussian.unet, 0.5 + 0.2 * (torch.rand(2, 1, 16, 16) - 0.5)
    made = gaussian.interpolate(images, 0, num_images=3, output_type="pt").images
    # trajectories of a Gaussian of mean 0 scale by a number, so noises are images up to a factor
    a, b = (2 * images - 1).double()
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    torch.testing.assert_close(made[1].double(), in_pixels((a + b) / (2 * (angle / 2).cos())), rtol=0, atol=1e-5)
    assert network.mean(torch.zeros(1)).item() == 0


def test_interpolation_keeps_the_norm_of_the_noise(gaussian, monkeypatch):
    seen = []
    sample = CTMPipeline.__call__
    monkeypatch.setattr(CTMPipeline, "__call__", lambda self, **kw: (seen.append(kw), sample(self, **kw))[1])
    images = images_of(gaussian, torch.tensor([1, 1]), n=2)
    gaussian.interpolate(images, 1, num_images=9)
    noise = gaussian.invert(images, 1)
    norms = seen[0]["latents"].flatten(1).norm(dim=1)
    low, high = sorted(noise.flatten(1).norm(dim=1).tolist())
    assert low * 0.999 <= norms.min() and norms.max() <= high * 1.001 and seen[0]["gamma"] == 0
    assert noise.mean(0).norm() < 0.8 * low  # a straight line would not keep the norm
    assert torch.equal(seen[0]["latents"][[0, -1]], noise)


def test_an_interpolation_by_the_ode_has_reconstructions_for_ends(random_network):
    pipe, images = ctm(random_network(num_classes=None), gamma=0.7), torch.rand(2, 1, 8, 8)
    made = pipe.interpolate(images, num_images=2, num_inference_steps=2, num_inverse_steps=3, output_type="pt").images
    noise = pipe.invert(images, num_inference_steps=3)
    assert torch.equal(made, in_steps(pipe, noise, num_inference_steps=2, gamma=0)) and made.std() > 0.01
    (pictures,) = pipe.interpolate(images, num_images=4, num_inverse_steps=1, return_dict=False)
    assert [picture.size for picture in pictures] == [(8, 8)] * 4


def test_between_equal_images_nothing_changes(gaussian):
    images = images_of(gaussian, torch.tensor([1]), n=1).expand(2, -1, -1, -1)
    made = gaussian.interpolate(images, 1, num_images=4, output_type="pt").images
    torch.testing.assert_close(made, images[:1].expand(4, -1, -1, -1), rtol=0, atol=1e-5)


PAIR = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": PAIR[:1]}, r"the two to interpolate between, \(2, C, H, W\), got 1"),
        ({"images": torch.cat([PAIR, PAIR])}, "the two to interpolate between, .* got 4"),
        ({"images": PAIR[0]}, "the two to interpolate between, .* got 1"),
        ({"images": PAIR[..., :4]}, r"images must have the shape \(n, 1, 16, 16\)"),
        ({"images": PAIR + 1}, r"images must lie in \[0, 1\]"),
        ({"num_images": 1}, "num_images must be at least 2, .* got 1"),
        ({"class_labels": [0, 1]}, r"of one class, .* got class_labels \[0, 1\]"),
        ({"class_labels": None}, "conditional; pass the class_labels"),
        ({"class_labels": 3}, r"integers in \[0, 2\]"),
        ({"output_type": "jpg"}, "output_type must be"),
        ({"num_inference_steps": 0}, "num_inference_steps must lie in"),
        ({"num_inverse_steps": 0}, "at least 1, got 0"),
    ],
)
def test_errors_of_an_interpolation_come_before_any_work(gaussian, arguments, message):
    gaussian.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        gaussian.interpolate(**{"images": PAIR, "class_labels": 0, **arguments})


def test_there_is_no_one_way_between_opposite_noises(gaussian):
    with pytest.raises(ValueError, match="opposite directions"):
        gaussian.interpolate(torch.cat([PAIR[:1], 1 - PAIR[:1]]), 0)


# --- saving


def test_what_is_saved_is_what_is_loaded(random_network, tmp_path):
    pipe = ctm(random_network(num_classes=None), gamma=0.4, gamma_rule="official", upward=True)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for parameter in again.unet.parameters():  # loaded weights are unaligned, where kernels round differently
        parameter.data = parameter.data.clone()
    assert type(again) is CTMPipeline and again.scheduler.config.upward and again.scheduler.config.gamma == 0.4
    x, images = torch.randn(1, 1, 8, 8), torch.rand(1, 1, 8, 8)
    assert torch.equal(again.jump(x, 0.5, 2.0), pipe.jump(x, 0.5, 2.0))
    assert torch.equal(again.invert(images), pipe.invert(images))
    for solver in ("gamma", "heun"):
        arguments = {"num_inference_steps": 3, "solver": solver}
        assert torch.equal(
            in_steps(again, x, generator=generator(), **arguments),
            in_steps(pipe, x, generator=generator(), **arguments),
        )


def test_every_argument_of_the_other_methods_is_documented():
    for method in (CTMPipeline.jump, CTMPipeline.invert, CTMPipeline.interpolate):
        lines = [line.strip() for line in method.__doc__.splitlines()]
        names = set(inspect.signature(method).parameters) - {"self"}
        assert names == {name for name in names if any(line.startswith(f"{name}: ") for line in lines)}


# --- errors


def test_networks_with_one_time_are_named_as_such(tiny_unet, tmp_path):
    with pytest.raises(ValueError, match="UNet2DModel takes only one.*ConsistencyPipeline"):
        CTMPipeline(tiny_unet(), CTMScheduler())
    for stock in (False, True):
        pipeline, scheduler = (
            (ConsistencyModelPipeline, CMStochasticIterativeScheduler())
            if stock
            else (ConsistencyPipeline, MultistepConsistencyScheduler())
        )
        pipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
        message = f"Its {type(scheduler).__name__} belongs to a consistency model: use ConsistencyPipeline"
        with pytest.raises(ValueError, match=message):
            CTMPipeline.from_pretrained(tmp_path)


def test_another_scheduler_is_refused(random_network):
    with pytest.raises(ValueError, match="needs a CTMScheduler, not a MultistepConsistencyScheduler.$"):
        CTMPipeline(random_network(), MultistepConsistencyScheduler())
    with pytest.raises(ValueError, match="not a FlowMatchEulerDiscreteScheduler.*use MeanFlowPipeline"):
        CTMPipeline(random_network(), FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gamma": 1.5}, r"\[0, 1\], got 1.5"),
        ({"gamma": -0.5}, r"\[0, 1\], got -0.5"),
        ({"solver": "dpm"}, "gamma, euler, heun; got 'dpm'"),
        ({"solver": "heun", "gamma": 0.5}, "gamma=0.5 has no effect on the solver 'heun'"),
        ({"num_inference_steps": 2, "sigmas": [80, 1]}, "exactly one"),
        ({"num_inference_steps": 2, "sigmas": [80, 1], "solver": "heun"}, "exactly one"),
        ({"num_inference_steps": 0, "solver": "euler"}, "at least 1, got 0"),
        *(({"sigmas": [80, 0.002], "solver": solver}, "above sigma_min=0.002") for solver in ("gamma", "heun")),
        ({"sigmas": [90]}, "exceed sigma_max=80.0"),
    ],
)
def test_errors_of_a_call_come_before_any_work(arguments, message):
    pipe = ctm(GaussianTrajectory())
    pipe.unet.register_forward_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


SAMPLE = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((SAMPLE, 1.0, 2.0), "not trained to jump to higher levels, from 1.0 to 2.0.*upward=True.*`invert`"),
        ((SAMPLE, torch.tensor([1.0, 3.0]), 2.0), "higher levels"),
        ((SAMPLE, 1.0, 0.0), r"sigma_to must lie in \[0.002, 80.0\] \(0.002 stands for 0\), got 0"),
        ((SAMPLE, 81.0, 1.0), r"sigma_from must lie in \[0.002, 80.0\]"),
        ((SAMPLE, math.nan, 1.0), "sigma_from must lie in"),
        ((SAMPLE, torch.ones(3), 1.0), r"sigma_from must be a number or one per sample, got the shape \(3,\)"),
        ((SAMPLE[:, :, :2], 1.0, 0.5), r"sample must be a tensor \(batch_size, 1, 4, 4\), got \(2, 1, 2, 4\)"),
        ((SAMPLE.numpy(), 1.0, 0.5), "sample must be a tensor .* got ndarray"),
        ((SAMPLE, 1.0, 0.5, 3), "unconditional"),
    ],
)
def test_errors_of_a_jump(arguments, message):
    with pytest.raises(ValueError, match=message):
        ctm(GaussianTrajectory()).jump(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": SAMPLE - 1}, r"images must lie in \[0, 1\], got \[-1, -1\]"),
        ({"images": SAMPLE * math.nan}, "images must be finite"),
        ({"images": SAMPLE[:, :, :2]}, r"images must have the shape \(n, 1, 4, 4\)"),
        ({"images": None}, "images must be given"),
        ({"solver": "jump"}, "upward=True; use solver='heun'"),
        ({"solver": "euler"}, "'jump' or 'heun', got 'euler'"),
        ({"num_inference_steps": 0}, "at least 1, got 0"),
        *(({"sigma_max": sigma}, r"sigma_max must lie in \(0.002, 80.0\]") for sigma in (81, 0.002, math.nan)),
    ],
)
def test_errors_of_an_inversion(arguments, message):
    with pytest.raises(ValueError, match=message):
        ctm(GaussianTrajectory()).invert(**{"images": SAMPLE, **arguments})


def test_labels_of_given_samples_are_not_guessed():
    pipe = ctm(GaussianTrajectory(num_class_embeds=5))
    for work in (
        lambda **labels: pipe.jump(SAMPLE, 1.0, 0.5, **labels),
        lambda **labels: pipe.invert(SAMPLE, **labels),
    ):
        with pytest.raises(ValueError, match="conditional; pass the class_labels"):
            work()
        with pytest.raises(ValueError, match=r"integers in \[0, 4\]"):
            work(class_labels=5)
        with pytest.raises(ValueError, match="the number of class_labels is 3"):
            work(class_labels=[1, 2, 3])

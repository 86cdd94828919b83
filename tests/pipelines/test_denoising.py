import json
import math

import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler

from cm_diffusers import DenoisingPipeline
from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.schedules import karras_sigmas
from cm_diffusers.core.solvers import euler_step, heun_step


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def network(tiny_unet):
    network = tiny_unet()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def in_pixels(sample):
    return (sample / 2 + 0.5).clamp(0, 1)


def solved(denoise, noise, n, solver):
    """What `core` makes of it: N Karras levels, and an Euler step to 0 at the end."""
    sigmas = karras_sigmas(n)
    x = noise * sigmas[0]
    for now, then in zip(sigmas[:-1, None].expand(-1, len(x)), sigmas[1:, None].expand(-1, len(x))):
        x = (heun_step if solver == "heun" else euler_step)(denoise, x, now, then)
    return euler_step(denoise, x, sigmas[-1:].expand(len(x)), torch.zeros(len(x)).double())


def test_euler_is_a_plain_loop_of_the_stock_scheduler(network):
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 8])
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler()))
    images = pipe(class_labels=labels, num_inference_steps=7, solver="euler", latents=noise, output_type="pt").images

    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(7)
    x = noise * scheduler.sigmas[0]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            output = network(scheduler.scale_model_input(x, t), 250 * scheduler.sigmas[i].log(), class_labels=labels)
            x = scheduler.step(output.sample, t, x).prev_sample
    assert torch.equal(images, in_pixels(x))


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("angle", [False, True])
@pytest.mark.parametrize("n", [2, 5, 18])
def test_both_solvers_are_those_of_core(gaussian_denoiser, solver, angle, n):
    network = gaussian_denoiser(num_class_embeds=5, angle=angle)
    time_label = "angle" if angle else "log_sigma"
    noise, labels = torch.randn(3, 1, 4, 4), torch.tensor([0, 2, 4])
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler(), time_label=time_label))
    images = pipe(class_labels=labels, num_inference_steps=n, solver=solver, latents=noise, output_type="pt").images

    denoiser = EDMDenoiser(network, 0.5, time_label=time_label)
    exact = solved(lambda x, sigma: denoiser(x, sigma, labels), noise.double(), n, solver)
    torch.testing.assert_close(images.double(), in_pixels(exact), rtol=0, atol=2e-5)


def test_heun_of_a_trained_like_network_is_that_of_core(network):
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 8])
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler()))
    images = pipe(class_labels=labels, num_inference_steps=6, latents=noise, output_type="pt").images
    denoiser = EDMDenoiser(network.double(), 0.5)
    with torch.no_grad():
        exact = solved(lambda x, sigma: denoiser(x, sigma, labels), noise.double(), 6, "heun")
    assert images.std() > 0.01
    torch.testing.assert_close(images.double(), in_pixels(exact), rtol=0, atol=1e-4)


def test_18_steps_of_heun_solve_the_ode_of_gaussian_data(gaussian_denoiser):
    network = gaussian_denoiser(num_class_embeds=5, data_std=0.2)
    noise, labels = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 4])
    exact = in_pixels(network.ode_solution(80 * noise, 80, labels))
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler()))
    errors = {}
    for solver in ("heun", "euler"):
        for n in (18, 36):
            arguments = {"class_labels": labels, "latents": noise, "solver": solver, "num_inference_steps": n}
            errors[solver, n] = (pipe(output_type="pt", **arguments).images - exact).abs().max().item()
    assert errors["heun", 18] < 0.02 and errors["heun", 36] < 0.004  # of values that differ by 0.6
    assert errors["euler", 18] > 2 * errors["heun", 18]
    assert math.log2(errors["heun", 18] / errors["heun", 36]) == pytest.approx(2, abs=0.5)
    assert math.log2(errors["euler", 18] / errors["euler", 36]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("solver, calls", [("euler", 6), ("heun", 11)])
def test_number_of_network_calls(network, solver, calls):
    seen = []
    network.register_forward_hook(lambda *args: seen.append(1))
    quiet(DenoisingPipeline(network, EDMEulerScheduler()))(num_inference_steps=6, solver=solver)
    assert len(seen) == calls


def test_a_schedule_that_ends_above_zero_is_corrected_to_its_end(gaussian_denoiser):
    network = gaussian_denoiser(data_std=0.2)
    noise = torch.randn(1, 1, 4, 4)
    scheduler = EDMEulerScheduler(final_sigmas_type="sigma_min", sigma_min=0.1)
    images = quiet(DenoisingPipeline(network, scheduler))(
        num_inference_steps=40, latents=noise, output_type="pt"
    ).images
    exact = 0.2 + (80 * noise - 0.2) * math.hypot(0.1, 0.2) / math.hypot(80, 0.2)
    torch.testing.assert_close(images, in_pixels(exact), rtol=0, atol=2e-3)


@pytest.fixture
def gaussian_flow(gaussian_denoiser):
    """A maker of flow networks, noise - x0, that are exact for Gaussian data."""

    class GaussianFlow(gaussian_denoiser):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            sigma = timestep.double().reshape(1) / (1 - timestep.double())
            x = sample.double() * (1 + sigma)
            denoised = EDMDenoiser(super().forward, self.config.sigma_data)(x, sigma, class_labels)
            return ((x - denoised) / sigma - denoised,)

    return GaussianFlow


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_flow_models_make_the_images_of_edm_models_that_know_the_same(gaussian_denoiser, gaussian_flow, solver):
    noise, labels = torch.randn(3, 1, 4, 4), torch.tensor([0, 2, 4])
    pipes = [
        DenoisingPipeline(gaussian_denoiser(num_class_embeds=5), EDMEulerScheduler()),
        DenoisingPipeline(gaussian_flow(num_class_embeds=5), EDMEulerScheduler(), prediction="flow"),
    ]
    images = [
        quiet(pipe)(class_labels=labels, num_inference_steps=7, solver=solver, latents=noise, output_type="pt").images
        for pipe in pipes
    ]
    torch.testing.assert_close(*images, rtol=0, atol=2e-5)


def test_flow_networks_are_given_flow_times_and_flow_samples(gaussian_flow):
    flow, seen = gaussian_flow(), []
    flow.register_forward_pre_hook(lambda module, args: seen.append(args))
    noise = torch.randn(2, 1, 4, 4)
    pipe = quiet(DenoisingPipeline(flow, EDMEulerScheduler(), prediction="flow"))
    pipe(latents=noise, num_inference_steps=5, solver="euler")
    sigmas = karras_sigmas(5)
    assert [float(t) for _, t in seen] == pytest.approx((sigmas / (1 + sigmas)).tolist(), rel=1e-6)
    torch.testing.assert_close(seen[0][0], noise * 80 / 81)


@pytest.mark.parametrize("config", [{}, {"time_label": "log_sigma"}, {"time_label": "angle"}])
def test_models_saved_before_there_were_flow_models_load(network, config, tmp_path):
    pipe = DenoisingPipeline(network, EDMEulerScheduler(), **config)
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    saved = json.loads(index.read_text())
    assert saved.pop("prediction") == "edm"
    index.write_text(json.dumps(saved))
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.config.prediction == "edm" and again.config.time_label == config.get("time_label", "log_sigma")


def test_prediction_is_saved(network, tmp_path):
    DenoisingPipeline(network, EDMEulerScheduler(), prediction="flow").save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.config.prediction == "flow" and again.config.time_label == "flow_time"


def test_time_label_is_saved(network, tmp_path):
    pipe = DenoisingPipeline(network, EDMEulerScheduler(sigma_data=0.7), time_label="angle")
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(again, DenoisingPipeline)
    assert again.config.time_label == "angle" and again.scheduler.config.sigma_data == 0.7


@pytest.mark.parametrize(
    "arguments, message", [({"solver": "dpm"}, "'heun' or 'euler'"), ({"num_inference_steps": 1}, "at least 2")]
)
def test_bad_arguments(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        DenoisingPipeline(network, EDMEulerScheduler())(**arguments)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"time_label": "sigma"}, "log_sigma, angle; got 'sigma'"),
        ({"time_label": "angle", "prediction": "flow"}, "'flow' must be one of flow_time; got 'angle'"),
        ({"prediction": "epsilon"}, "edm, flow; got 'epsilon'"),
    ],
)
def test_bad_configurations(network, config, message):
    with pytest.raises(ValueError, match=message):
        DenoisingPipeline(network, EDMEulerScheduler(), **config)

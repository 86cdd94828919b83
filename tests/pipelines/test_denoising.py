import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.schedulers import scheduling_edm_dpmsolver_multistep as stock_sde

from cm_diffusers import DenoisingPipeline
from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.solvers import euler_step, heun_step
from cm_diffusers.toys import TASKS


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def network(tiny_unet):
    network = tiny_unet()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def in_pixels(sample):
    return (sample / 2 + 0.5).clamp(0, 1)


def solved(denoise, noise, n, solver):
    """The solution by `core`: `n` Karras levels, and a final Euler step to 0."""
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
    exact = solved(lambda x, sigma: denoiser(x, sigma, of_classes(labels)), noise.double(), n, solver)
    torch.testing.assert_close(images.double(), in_pixels(exact), rtol=0, atol=2e-5)


def test_heun_of_a_trained_like_network_is_that_of_core(network):
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 8])
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler()))
    images = pipe(class_labels=labels, num_inference_steps=6, latents=noise, output_type="pt").images
    denoiser = EDMDenoiser(network.double(), 0.5)
    with torch.no_grad():
        exact = solved(lambda x, sigma: denoiser(x, sigma, of_classes(labels)), noise.double(), 6, "heun")
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
    assert errors["heun", 18] < 0.02 and errors["heun", 36] < 0.004  # the values differ by 0.6
    assert errors["euler", 18] > 2 * errors["heun", 18]
    assert math.log2(errors["heun", 18] / errors["heun", 36]) == pytest.approx(2, abs=0.5)
    assert math.log2(errors["euler", 18] / errors["euler", 36]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("solver, calls", [("euler", 6), ("heun", 11), ("ddim", 6), ("sde", 6), ("sde_2m", 6)])
def test_number_of_network_calls(network, solver, calls):
    seen = []
    network.register_forward_hook(lambda *args: seen.append(1))
    quiet(DenoisingPipeline(network, EDMEulerScheduler()))(num_inference_steps=6, solver=solver)
    assert len(seen) == calls


# --- DDIM, churn and the SDE


def test_ddim_is_euler_by_another_name(network):
    arguments = {"class_labels": 3, "num_inference_steps": 5, "latents": torch.randn(1, 1, 8, 8), "output_type": "pt"}
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler()))
    assert torch.equal(pipe(solver="ddim", **arguments).images, pipe(solver="euler", **arguments).images)


def first_order_sde(x, denoised, now, then, noise):
    keep = (then / now) ** 2
    return keep * x + (1 - keep) * denoised + then * (1 - keep).sqrt() * noise


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_in_sigma_the_stock_step_of_ddim_is_euler_s_and_with_eta_1_the_sde_s(eta):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample", set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    x, denoised, noise = torch.randn(3, 2, 1, 4, 4).double()
    t, t_next = scheduler.timesteps[4:6]
    abar, abar_next = scheduler.alphas_cumprod[t].double(), scheduler.alphas_cumprod[t_next].double()
    now, then = ((1 / a - 1).sqrt() for a in (abar, abar_next))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    stock = scheduler.step(denoised, t, abar.sqrt() * x, eta=eta, variance_noise=noise).prev_sample / abar_next.sqrt()
    if eta:
        ours = first_order_sde(x, denoised, now, then, noise)
    else:
        ours = euler_step(lambda x, sigma: denoised, x, now.expand(2), then.expand(2))
    torch.testing.assert_close(stock, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("solver, order", [("sde", 1), ("sde_2m", 2)])
def test_the_sde_is_a_plain_loop_of_the_stock_scheduler(network, solver, order, by_position):
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 8])
    given = (0.002, 50.0, 0.6)
    named = dict(zip(("sigma_min", "sigma_max", "sigma_data"), given, strict=True))
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler(*given) if by_position else EDMEulerScheduler(**named)))
    arguments = {"class_labels": labels, "num_inference_steps": 20, "latents": noise, "generator": seeded(4)}
    images = pipe(solver=solver, output_type="pt", **arguments).images

    settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "sigma_data": 0.6, "sigma_max": 50.0}
    scheduler, generator = EDMDPMSolverMultistepScheduler(**settings), seeded(4)
    scheduler.set_timesteps(20)
    x = noise * scheduler.sigmas[0]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            output = network(scheduler.scale_model_input(x, t), 250 * scheduler.sigmas[i].log(), class_labels=labels)
            x = scheduler.step(output.sample, t, x, generator=generator).prev_sample
    torch.testing.assert_close(images, in_pixels(x), rtol=0, atol=1e-4)


def test_the_sde_of_order_1_is_ancestral_sampling(gaussian_denoiser):
    network, noise, generator = gaussian_denoiser(), torch.randn(2, 1, 4, 4), seeded(7)
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler()))
    images = pipe(num_inference_steps=9, solver="sde", latents=noise, generator=seeded(7), output_type="latent").images
    denoiser, sigmas = EDMDenoiser(network, 0.5), [*karras_sigmas(9), torch.zeros(()).double()]
    x = noise.double() * 80
    for now, then in zip(sigmas, sigmas[1:]):
        x = first_order_sde(x, denoiser(x, now.expand(2)), now, then, torch.randn(2, 1, 4, 4, generator=generator))
    torch.testing.assert_close(images.double(), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("limits", [{}, {"s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.007}])
@pytest.mark.parametrize("s_churn", [4.0, 40.0])
def test_churn_is_algorithm_2(gaussian_denoiser, solver, limits, s_churn):
    network, noise, generator, n = gaussian_denoiser(), torch.randn(2, 1, 4, 4), seeded(7), 12
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler()))
    arguments = {"num_inference_steps": n, "solver": solver, "s_churn": s_churn, **limits}
    images = pipe(latents=noise, generator=seeded(7), output_type="latent", **arguments).images

    denoiser, sigmas = EDMDenoiser(network, 0.5), [*karras_sigmas(n), torch.zeros(()).double()]
    x, step = noise.double() * 80, heun_step if solver == "heun" else euler_step
    for now, then in zip(sigmas, sigmas[1:]):
        if limits.get("s_tmin", 0) <= now <= limits.get("s_tmax", math.inf):
            higher = now * (1 + min(s_churn / n, 2**0.5 - 1))
            new = limits.get("s_noise", 1) * torch.randn(2, 1, 4, 4, generator=generator)
            x, now = x + (higher**2 - now**2).sqrt() * new, higher
        x = (euler_step if then == 0 else step)(denoiser, x, now.expand(2), then.expand(2))
    torch.testing.assert_close(images.double(), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("place", [0, 2])
def test_levels_at_the_limits_of_churn_are_churned(gaussian_denoiser, place):
    """Algorithm 2: S_min <= t_i <= S_max. Each churned level draws once."""
    pipe, noise, n = quiet(DenoisingPipeline(gaussian_denoiser(), EDMEulerScheduler())), torch.randn(1, 1, 4, 4), 6
    pipe.scheduler.set_timesteps(n)
    level = float(pipe.scheduler.sigmas[place])
    used, expected = seeded(7), seeded(7)
    pipe(latents=noise, generator=used, num_inference_steps=n, s_churn=3.0, s_tmin=level, s_tmax=level)
    torch.randn(noise.shape, generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())


@pytest.mark.parametrize("solver, order", [("sde", 1), ("sde_2m", 2)])
def test_weak_order_of_the_sde(gaussian_denoiser, monkeypatch, solver, order):
    """The exact variance of samples of Gaussian data: images are linear in the noise of each step."""
    pipe = quiet(DenoisingPipeline(gaussian_denoiser(sample_size=1, data_std=0.3), EDMEulerScheduler()))
    exact = 0.3**4 / (0.3**2 + 0.002**2)  # the variance of the denoised image at the lowest level
    errors = []
    for n in (64, 128, 256):
        steps = iter(torch.eye(n + 2)[:, 1:-1].T)  # only row i + 1 has noise in step i
        monkeypatch.setattr(stock_sde, "randn_tensor", lambda shape, steps=steps, **_: next(steps).reshape(shape))
        latents = torch.eye(n + 2)[:, -1].reshape(-1, 1, 1, 1)
        images = pipe(num_inference_steps=n, solver=solver, latents=latents, output_type="latent").images.double()
        assert images[0].item() == pytest.approx(0.2, abs=1e-4)
        errors.append(abs((images[1:] - images[0]).square().sum().item() - exact))
    assert errors[-1] < (0.005 if order == 1 else 0.0002)
    measured = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert measured == pytest.approx([order, order], abs=0.12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_inference_steps": 40},
        {"num_inference_steps": 60, "s_churn": 10.0},
        {"num_inference_steps": 250, "solver": "sde"},
        {"num_inference_steps": 60, "solver": "sde_2m"},
    ],
)
def test_moments_of_an_exact_mixture(gaussian_denoiser, arguments):
    task, n = TASKS["uneven_two_gmm"], 100
    pipe = quiet(DenoisingPipeline(gaussian_denoiser(sample_size=n), EDMEulerScheduler()))
    pipe.denoise = lambda sample, sigma, labels: task.denoised(sample, sigma[None])  # each pixel is a sample
    values = pipe(generator=seeded(0), output_type="latent", **arguments).images.double().flatten()
    means, stds, weights = (torch.tensor(v).double() for v in (task.means, task.stds, task.weights))
    second = means**2 + stds**2
    exact = [means, second, means**3 + 3 * means * stds**2, 3 * second**2 - 2 * means**4]
    for power, moments in enumerate(exact, 1):
        powers = values**power
        assert abs(powers.mean() - (weights * moments).sum()) < 4 * powers.std() / n, power


@pytest.mark.parametrize("arguments", [{"solver": "sde"}, {"solver": "sde_2m"}, {"s_churn": 5.0}])
def test_new_noise_is_the_images_own(network, arguments):
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler()))
    arguments |= {"num_inference_steps": 5, "output_type": "pt"}
    images = pipe(generator=[seeded(i) for i in range(3)], class_labels=[4, 4, 7], **arguments).images
    for i, label in enumerate((4, 4, 7)):
        alone = pipe(generator=[seeded(i)], class_labels=label, **arguments).images
        torch.testing.assert_close(alone[0], images[i], rtol=0, atol=5e-5)
    latents = torch.randn(1, 1, 8, 8)
    state = torch.get_rng_state()
    first, other = (pipe(latents=latents, generator=seeded(i), class_labels=1, **arguments).images for i in range(2))
    assert (first - other).abs().max() > 1e-2 and torch.equal(torch.get_rng_state(), state)


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
    """A function that makes flow networks (noise - x0) which are exact for Gaussian data."""

    class GaussianFlow(gaussian_denoiser):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            sigma = timestep.double().reshape(1) / (1 - timestep.double())
            x = sample.double() * (1 + sigma)
            denoised = EDMDenoiser(super().forward, self.config.sigma_data)(x, sigma, of_classes(class_labels))
            return ((x - denoised) / sigma - denoised,)

    return GaussianFlow


@pytest.mark.parametrize("solver", ["euler", "heun", "sde", "sde_2m"])
def test_flow_models_make_the_images_of_edm_models_that_know_the_same(gaussian_denoiser, gaussian_flow, solver):
    noise, labels = torch.randn(3, 1, 4, 4), torch.tensor([0, 2, 4])
    pipes = [
        DenoisingPipeline(gaussian_denoiser(num_class_embeds=5), EDMEulerScheduler()),
        DenoisingPipeline(gaussian_flow(num_class_embeds=5), EDMEulerScheduler(), prediction="flow"),
    ]
    arguments = {"class_labels": labels, "num_inference_steps": 7, "solver": solver, "latents": noise}
    images = [quiet(pipe)(generator=seeded(1), output_type="pt", **arguments).images for pipe in pipes]
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


@pytest.mark.parametrize(
    "time_label, labels",
    [
        ("log_sigma", [1095.5066587, -1553.6520246]),
        ("quarter_log_sigma", [1.0955066587, -1.5536520246]),
        ("angle", [1.5645464111, 0.0039999787]),
    ],
)
def test_edm_networks_are_told_of_the_level_by_their_time_label(network, time_label, labels):
    """At sigma 80 and 0.002, for sigma_data 0.5."""
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    quiet(DenoisingPipeline(network, EDMEulerScheduler(), time_label))(num_inference_steps=2, solver="euler")
    assert seen == pytest.approx(labels, rel=1e-5)


@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
def test_flow_networks_are_told_of_the_flow_time_in_their_scale(network, time_scale):
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    pipe = quiet(DenoisingPipeline(network, EDMEulerScheduler(), prediction="flow", time_scale=time_scale))
    pipe(num_inference_steps=2, solver="euler")
    assert seen == pytest.approx([time_scale * 80 / 81, time_scale * 0.002 / 1.002], rel=1e-5)


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
    "arguments, message",
    [
        ({"solver": "dpm"}, "one of heun, euler, ddim, sde, sde_2m; got 'dpm'"),
        ({"num_inference_steps": 1}, "at least 2"),
        ({"s_churn": -1.0}, "s_churn must be a number of at least 0, got -1.0"),
        ({"s_churn": math.nan}, "s_churn must be a number"),
        ({"s_churn": 1.0, "solver": "sde"}, "s_churn is for the solvers heun and euler; got 1.0 for 'sde'"),
        ({"s_noise": 1.01}, "are for s_churn > 0"),
        ({"s_churn": 1.0, "s_tmin": 2.0, "s_tmax": 1.0}, "0 <= s_tmin <= s_tmax, got 2.0 and 1.0"),
        ({"s_churn": 1.0, "s_noise": 0.0}, "s_noise must be a number above 0"),
    ],
)
def test_bad_arguments(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        DenoisingPipeline(network, EDMEulerScheduler())(**arguments)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"time_label": "sigma"}, "log_sigma, angle; got 'sigma'"),
        ({"time_label": "angle", "prediction": "flow"}, "'flow' must be one of flow_time; got 'angle'"),
        ({"prediction": "sample"}, "edm, flow, epsilon, v_prediction; got 'sample'"),
        (
            {"prediction": "epsilon"},
            "noise_schedule is for the predictions '.*', which need it; got",
        ),
        ({"noise_schedule": {"beta_schedule": "linear"}}, "noise_schedule is for"),
    ],
)
def test_bad_configurations(network, config, message):
    with pytest.raises(ValueError, match=message):
        DenoisingPipeline(network, EDMEulerScheduler(), **config)

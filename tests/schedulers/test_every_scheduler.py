"""Properties of all schedulers of the library."""

import functools
import math

import numpy as np
import pytest
import torch

from cm_diffusers import CTMScheduler, MultistepConsistencyScheduler, TrigFlowScheduler


KINDS = {
    "ctm": CTMScheduler,
    "ctm, gamma": functools.partial(CTMScheduler, gamma=0.5),
    "ctm, official": functools.partial(CTMScheduler, gamma=0.5, gamma_rule="official"),
    "ctm, angles": functools.partial(CTMScheduler, gamma=1.0, time_label="angle", sigma_min=0.0),
    "multistep": MultistepConsistencyScheduler,
    "multistep, angles": functools.partial(MultistepConsistencyScheduler, time_label="angle", sigma_min=0.0),
    "trigflow": TrigFlowScheduler,
    "trigflow euler": functools.partial(TrigFlowScheduler, solver="euler"),
    "trigflow heun": functools.partial(TrigFlowScheduler, solver="heun"),
}
NOISY = ["ctm, gamma", "ctm, official", "ctm, angles", "multistep", "multistep, angles", "trigflow"]
SHAPE = (2, 3, 4, 4)


@pytest.fixture(params=KINDS)
def build(request):
    return KINDS[request.param]


@pytest.fixture
def make(build):
    """A function that makes schedulers with levels set."""

    def make(n=None, sigmas=None, timesteps=None, device=None, **config):
        scheduler = build(**config)
        scheduler.set_timesteps(n, device=device, sigmas=sigmas, timesteps=timesteps)
        return scheduler

    return make


noisy = pytest.mark.parametrize("build", [KINDS[kind] for kind in NOISY], ids=NOISY)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(scheduler, dtype=torch.float32):
    x, noise = torch.randn(SHAPE, generator=generator()).to(dtype) * scheduler.init_noise_sigma, generator(1)
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, t).sin(), t, x, noise).prev_sample
    return x


# --- levels


@pytest.mark.parametrize(
    "arguments", [{}, {"n": 2, "sigmas": [80]}, {"n": 2, "timesteps": [0.5]}, {"sigmas": [80], "timesteps": [0.5]}]
)
def test_exactly_one_way_to_choose_the_levels(make, arguments):
    with pytest.raises(ValueError, match="exactly one"):
        make(**arguments)


@pytest.mark.parametrize("n", [0, -1])
def test_too_few_steps(make, n):
    with pytest.raises(ValueError, match=f"num_inference_steps must .* got {n}"):
        make(n)


@pytest.mark.parametrize(
    "sigmas, message",
    [
        *(([], "non-empty"), ([80, math.nan], "list of"), ([1, 80], "fall strictly"), ([80, 1, 1], "fall strictly")),
        *(([80, 0], "above"), ([80, -1], "above"), ([81, 1], "exceed sigma_max=80.0")),
    ],
)
def test_bad_levels(make, sigmas, message):
    with pytest.raises(ValueError, match=message):
        make(sigmas=sigmas)


def test_labels_must_fall(make):
    with pytest.raises(ValueError, match="`timesteps` must fall strictly"):
        make(timesteps=[0.1, 0.2])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_grid_indices_are_no_labels(make, kind):
    with pytest.raises(ValueError, match="Grid indices|not grid indices"):
        make(timesteps=kind([22, 0]))


def test_labels_can_be_given_back_as_timesteps(make):
    first = make(sigmas=[80, 5.5, 0.3])
    labels = first.timesteps.unique().flip(0)  # Heun's levels appear twice
    for given in (labels, labels.tolist(), labels.numpy()):
        again = make(timesteps=given)
        torch.testing.assert_close(again.sigmas, first.sigmas, rtol=1e-11, atol=0)
        assert again.num_inference_steps == 3


def test_labels_are_float64_except_where_the_device_has_none(make, monkeypatch):
    move = torch.Tensor.to

    def to_cpu_instead(tensor, device, *args):  # treat the CPU as an Apple GPU
        return move(tensor, "cpu" if str(device) == "mps" else device, *args)

    monkeypatch.setattr(torch.Tensor, "to", to_cpu_instead)
    for device, dtype in (("mps", torch.float32), (torch.device("mps"), torch.float32), ("cpu", torch.float64)):
        scheduler = make(4, device=device)
        assert scheduler.timesteps.dtype == dtype
        assert scheduler.sigmas.dtype == torch.float64


def test_sigma_max_in_float32_is_not_beyond_sigma_max(make):
    """float32 rounds 14.6 up, and labels turn 80 into 80 (1 + 1e-7). An excess above 1e-6 is refused."""
    assert float(np.float32(14.6)) > 14.6
    for sigmas in (np.array([14.6, 1], dtype=np.float32), torch.tensor([14.6, 1.0])):
        assert make(sigmas=sigmas, sigma_max=14.6).num_inference_steps == 2
    make(sigmas=[80 * (1 + 9e-7)])
    with pytest.raises(ValueError, match="exceed sigma_max"):
        make(sigmas=[80 * (1 + 1.1e-6)])


def test_all_labels_go_to_the_device_that_is_asked_for(make):
    scheduler = make(3, device="meta")
    labels = [
        value for name, value in vars(scheduler).items() if name.endswith("timesteps") and torch.is_tensor(value)
    ]
    assert labels and all(value.is_meta for value in labels)
    assert not scheduler.sigmas.is_meta


# --- which step


@pytest.mark.parametrize("timestep", [0, torch.tensor(1)])
def test_an_index_is_no_timestep(make, timestep):
    with pytest.raises(ValueError, match="integer index"):
        make(2).scale_model_input(torch.randn(SHAPE), timestep)


def test_a_label_that_was_not_set_is_no_timestep(make):
    with pytest.raises(ValueError, match="not one of"):
        make(2).scale_model_input(torch.randn(SHAPE), 0.7)


def test_labels_in_float32_are_found(make):
    x = torch.randn(SHAPE)
    first, second = make(3), make(3)
    label = first.timesteps[-1]
    assert torch.equal(first.scale_model_input(x, label), second.scale_model_input(x, label.float()))
    assert first.step_index == second.step_index == len(first.timesteps) - 1


def test_begin_index_starts_in_the_middle(make):
    scheduler, x = make(4), torch.randn(SHAPE)
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.set_begin_index(2)
    scheduler.scale_model_input(x, scheduler.timesteps[2])
    assert scheduler.step_index == 2
    scheduler.step(x, scheduler.timesteps[2], x)
    assert scheduler.step_index == 3


def test_new_levels_begin_with_the_first_whatever_began_before(make):
    scheduler, x = make(4), torch.randn(SHAPE)
    scheduler.set_begin_index(2)
    scheduler.set_timesteps(4)
    assert scheduler.begin_index is None and scheduler.step_index is None
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    assert scheduler.step_index == 0


# --- steps


@noisy
def test_last_step_adds_no_noise_and_consumes_none(make):
    scheduler, noise = make(2), generator()
    x, output = torch.randn(2, *SHAPE)
    before = noise.get_state()
    first = scheduler.step(output, scheduler.timesteps[0], x, noise)
    between = noise.get_state()
    last = scheduler.step(output, scheduler.timesteps[1], x, noise)
    assert not torch.equal(before, between)
    assert torch.equal(noise.get_state(), between)
    assert not torch.equal(first.prev_sample, first.pred_original_sample)
    assert torch.equal(last.prev_sample, last.pred_original_sample)


@noisy
def test_a_generator_per_sample_makes_samples_independent(make):
    x, output = torch.randn(2, 3, 1, 4, 4)

    def step(rows, generators):
        scheduler = make(sigmas=[80, 0.8])
        return scheduler.step(output[rows], scheduler.timesteps[0], x[rows], generators).prev_sample

    together = step(slice(3), [generator(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(step(slice(i, i + 1), [generator(i)])[0], together[i])


def test_tuple_and_object_hold_the_same(make):
    x, output = torch.randn(2, *SHAPE)
    scheduler = make(2)
    as_object = scheduler.step(output, scheduler.timesteps[0], x, generator())
    scheduler = make(2)
    as_tuple = scheduler.step(output, scheduler.timesteps[0], x, generator(), return_dict=False)
    assert torch.equal(as_tuple[0], as_object.prev_sample) and torch.equal(as_tuple[0], as_object[0])
    assert torch.equal(as_tuple[1], as_object.pred_original_sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_samples_keep_their_dtype(make, dtype):
    assert run(make(4), dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_samples_are_computed_in_float32(make, dtype):
    x, output = torch.randn(2, *SHAPE).to(dtype) * 20
    results = []
    for of_step in (dtype, torch.float32):
        scheduler = make(sigmas=[40], clip_denoised=False)
        step = scheduler.step(output.to(of_step), scheduler.timesteps[0], x.to(of_step))
        results.append(step.prev_sample.to(dtype))
    assert torch.equal(*results)


# --- noise at any level, configuration


@pytest.mark.parametrize("arguments", [{}, {"timesteps": torch.ones(1), "sigmas": torch.ones(1)}])
def test_noise_needs_exactly_one_kind_of_level(build, arguments):
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="exactly one"):
        build().add_noise(x, x, **arguments)


def test_a_saved_scheduler_is_the_same_scheduler(build, tmp_path):
    config = {"sigma_data": 0.7, "sigma_max": 60.0, "rho": 5.0, "clip_denoised": False}
    scheduler = build(**config)
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    assert all(again.config[name] == value for name, value in scheduler.config.items() if name[0] != "_")
    for one in (scheduler, again):
        one.set_timesteps(5)
    assert torch.equal(run(again), run(scheduler))


def test_default_sigmas_are_the_levels_of_their_number_of_steps_and_are_saved(build, tmp_path):
    build(default_sigmas={"2": [80.0, 0.8]}).save_pretrained(tmp_path)
    scheduler = type(build()).from_pretrained(tmp_path)
    told, plain = build(), build()
    told.set_timesteps(sigmas=[80, 0.8])
    scheduler.set_timesteps(2)
    assert torch.equal(scheduler.sigmas, told.sigmas) and torch.equal(run(scheduler), run(told))
    for one in (scheduler, plain):
        one.set_timesteps(3)
    assert torch.equal(scheduler.sigmas, plain.sigmas)


@pytest.mark.parametrize(
    "stored, message",
    [
        ({"2": [80.0]}, r"default_sigmas\['2'\] must hold as many"),
        ({"two": [80.0, 0.8]}, "must hold as many"),
        ({"2": [0.8, 80.0]}, "must fall strictly"),
        ({"2": [90.0, 0.8]}, "exceed sigma_max"),
        ({"2": [80.0, 0.0]}, "above"),
    ],
)
def test_default_sigmas_that_can_not_be_are_refused(build, stored, message):
    with pytest.raises(ValueError, match=message):
        build(default_sigmas=stored)


@pytest.mark.parametrize(
    "config, message",
    [
        *(
            ({"sigma_data": value}, "sigma_data must be positive")
            for value in (0.0, -0.5, math.nan, "0.5", None, True)
        ),
        *(({"sigma_max": value}, "sigma_max must be positive and finite") for value in (math.inf, math.nan, 0, "80")),
        *(({"sigma_min": value}, "sigma_min") for value in (-0.1, math.nan, 80.0, 90.0)),
        *(({"rho": value}, "rho must be positive and finite") for value in (0, -7.0, math.inf)),
        *(({"clip_denoised": value}, "clip_denoised must be True or False") for value in ("no", None)),
        *(({"default_sigmas": value}, "default_sigmas") for value in ([80.0, 0.8], {"2": "80"}, {"1": [None]})),
    ],
)
def test_settings_outside_their_range_are_errors_from_the_start(build, config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)


@pytest.mark.parametrize("n", [2.5, "2", True])
def test_a_number_of_steps_that_is_no_integer(make, n):
    with pytest.raises(ValueError, match="num_inference_steps must .* got"):
        make(n)


@pytest.mark.parametrize("sigmas", ["80", [None], [[80.0]], {80.0}])
def test_levels_that_are_no_list_of_numbers(make, sigmas):
    with pytest.raises(ValueError, match="`sigmas` must be a number or a list of numbers"):
        make(sigmas=sigmas)


def test_one_level_may_stand_alone(make):
    for sigmas in (40, 40.0, np.float32(40), torch.tensor(40.0), [torch.tensor(40.0)]):
        assert torch.equal(make(sigmas=sigmas).sigmas, make(sigmas=[40.0]).sigmas)


@pytest.mark.parametrize("timesteps", [3, [3], np.array([3]), torch.tensor([3]), np.int64(3)])
def test_noise_at_an_index_is_refused_as_a_step_at_it_is(make, timesteps):
    scheduler, x = make(2), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="not the integer index"):
        scheduler.add_noise(x, x, timesteps)
    if np.ndim(timesteps) == 0:
        with pytest.raises(ValueError, match="not the integer index"):
            scheduler.scale_model_input(x, timesteps)


def test_a_step_after_the_last_and_a_begin_that_is_none_are_errors(make):
    scheduler = make(3)
    run(scheduler)
    x = torch.zeros(SHAPE)
    for again in (scheduler.scale_model_input, lambda x, t: scheduler.step(x, t, x)):
        with pytest.raises(ValueError, match="steps were made; call `set_timesteps`"):
            again(x, scheduler.timesteps[0])
    for index in (-1, len(scheduler.timesteps), 1.0):
        with pytest.raises(ValueError, match="begin_index must be an integer in"):
            scheduler.set_begin_index(index)

"""Properties of every training method, including one from outside the package."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline

from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.time_labels import OWN_LABELS
from cm_diffusers.objectives import OBJECTIVES, Batch, ModelSpec
from cm_diffusers.objectives.options import TeacherOptions
from tests.helpers.apple import without_float64
from tests.helpers.breadth import narrowed
from tests.helpers.new_method import Halving


METHODS = {**OBJECTIVES, Halving.name: Halving}

# the battery's settings for methods whose defaults do not reach all of their code
OPTIONS = {
    "ect": [{"pretrain_steps": 0, "stage_steps": 1}, {"pretrain_steps": 100}],
    "cd": [{}, {"solver": "euler"}],
    "ecd": [{"stage_steps": 1}],
    "diffusion": [{}, {"interpolant": "trigflow"}, {"interpolant": "flow"}],
    "cdm": [{"rollout_steps": 2}, {"interpolant": "flow", "rollout_steps": 1}],
    "sct": [
        {"tangent_warmup_steps": 4},
        {"tangent_norm": "rms", "prior_weight": "inverse_sigma", "jvp_mode": "finite_difference"},
    ],
    "scd": [{"tangent_warmup_steps": 1, "tangent_norm": "clip"}],
    "mean_flow": [{"equal_times": 0.0}, {"power": 0.0}],
    "ctm": [
        {"pretrained_teacher_model": "given", "solver_steps": 2, "balance": "fixed"},
        {"solver_steps": 2, "gan_weight": 0.5, "balance": "fixed", "discriminator_start_step": 2},
        {"trajectory": "data", "solver_steps": 1, "balance": "fixed"},
    ],
}

# students that keep another diffusion model's process: every method that supports one, and every kind at least once
STUDENTS = {
    name: cls.native_predictions[i % len(cls.native_predictions)]
    for i, (name, cls) in enumerate(METHODS.items())
    if cls.native_predictions
}
SPECS = {"flow": {"time_scale": 1000.0}, "epsilon": {"noise_schedule": {"beta_schedule": "linear"}}}
SPECS["v_prediction"] = {"noise_schedule": {"beta_schedule": "squaredcos_cap_v2"}}

CASES = [
    pytest.param(name, options, id=f"{name}-{i}")
    for name in METHODS
    for i, options in enumerate(OPTIONS.get(name, [{}]))
]
CASES += [
    pytest.param(name, {**OPTIONS.get(name, [{}])[0], "student": kind}, id=f"{name}-{kind}")
    for name, kind in STUDENTS.items()
]
every_objective = pytest.mark.parametrize("name, options", CASES)
# for slow tests: `make test` runs each method's first options; the others are wide
FIRST = [case for case in CASES if case.id.endswith("-0")]
OTHERS = [pytest.param(*case.values, id=case.id, marks=pytest.mark.wide) for case in CASES if case not in FIRST]
every_method = pytest.mark.parametrize("name, options", FIRST + OTHERS)
STEP = 3


@pytest.fixture
def make(tiny_unet):
    def build(name, options, dtype=torch.float32, **unet):
        cls, student = METHODS[name], options.get("student")
        options = cls.Options(**{key: value for key, value in options.items() if key != "student"})
        prediction = student or cls.prediction(options)
        label = OWN_LABELS.get(prediction, "log_sigma")
        spec = ModelSpec(sigma_data=0.5, time_label=label, prediction=prediction, **SPECS.get(student, {}))
        network = tiny_unet(**unet).to(dtype)
        torch.manual_seed(1)
        for parameter in network.parameters():  # a new U-Net has zero weights, which stop gradients
            torch.nn.init.normal_(parameter, std=0.05)
        teacher = None
        if cls.needs_teacher or options.teacher is not None:
            teacher = spec.denoiser(copy.deepcopy(network).eval().requires_grad_(False))
        network = cls.adapt(network, spec).train()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        objective = cls(network, spec, options, total_steps=1000, teacher=teacher)
        if objective.adversary is not None:
            objective.adversary.network.to(dtype)
        return objective

    return build


def batch_of(n=8, channels=1, size=(8, 8), classes=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(n, channels, *size, generator=generator).to(dtype) * 2 - 1
    labels = torch.randint(classes, (n,), generator=generator) if classes else None
    return Batch(images, of_classes(labels))


def gradient(objective, batch, rows):
    objective.network.zero_grad()
    loss = objective.loss(batch, Draws(0, STEP, rows))
    loss.total.backward()
    return loss, {name: parameter.grad.clone() for name, parameter in objective.network.named_parameters()}


@every_objective
def test_gradient_reaches_every_parameter_and_is_finite(make, name, options):
    objective = make(name, options)
    _, gradients = gradient(objective, batch_of(), range(8))
    for parameter, value in gradients.items():
        assert value.isfinite().all(), parameter
        assert parameter.endswith("to_k.bias") or value.abs().max() > 0, parameter  # softmax cancels a bias of keys


@every_method
def test_loss_is_repeatable_and_does_not_depend_on_the_global_generator(make, name, options):
    objective = make(name, options, dropout=0.3)
    torch.manual_seed(0)
    first, first_gradient = gradient(objective, batch_of(), range(8))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again, again_gradient = gradient(objective, batch_of(), range(8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.total, again.total) and torch.equal(first.per_sample, again.per_sample)
    assert all(torch.equal(first_gradient[key], again_gradient[key]) for key in first_gradient)
    assert not torch.equal(objective.loss(batch_of(), Draws(0, STEP + 1, range(8))).sigma, first.sigma)


WITHOUT_TANGENTS = [case.values for case in CASES if not METHODS[case.values[0]].needs_tangents]
ENOUGH = [values for values in WITHOUT_TANGENTS if values[0] == "cdm"]  # float64, and processes with a table of times


@pytest.mark.parametrize(
    "name, options", [pytest.param(*v, marks=[] if v in ENOUGH else pytest.mark.wide) for v in WITHOUT_TANGENTS]
)
def test_a_loss_on_a_device_without_float64_is_that_of_the_cpu(make, name, options, monkeypatch):
    expected = make(name, options).loss(batch_of(), Draws(0, STEP, range(8))).total.item()
    objective = make(name, options)
    networks = [objective.network, *objective.auxiliary.values()]
    networks += [objective.teacher.network] if objective.teacher is not None else []
    networks += [objective.adversary.network] if objective.adversary is not None else []
    with without_float64(monkeypatch, *networks) as device:
        batch = Batch(batch_of().samples.to(device), batch_of().condition.to(device))
        loss = objective.loss(batch, Draws(0, STEP, range(8), device))
        assert loss.total.item() == pytest.approx(expected, rel=1e-4)


@every_method
def test_total_is_the_mean_over_the_samples(make, name, options):
    loss = make(name, options).loss(batch_of(), Draws(0, STEP, range(8)))
    assert loss.per_sample.shape == loss.sigma.shape == (8,)
    assert not loss.per_sample.requires_grad and loss.total.requires_grad
    assert (loss.sigma > 0).all()
    parts = [part for part in loss.terms if f"{part}_weight" in loss.terms]
    expected = loss.per_sample.mean() + sum(loss.terms[f"{part}_weight"] * loss.terms[part].mean() for part in parts)
    torch.testing.assert_close(loss.total.detach(), expected)
    assert not any(value.requires_grad for value in loss.terms.values())
    assert set(loss.terms) <= set(METHODS[name].terms)


@every_method
def test_gradient_of_half_batches_averages_to_that_of_the_whole(make, name, options):
    objective = make(name, options, dtype=torch.float64)
    batch = batch_of(dtype=torch.float64)
    loss, whole = gradient(objective, batch, range(8))
    halves, per_sample = [], []
    for rows in (range(4), range(4, 8)):
        part = Batch(batch.samples[list(rows)], batch.condition.rows(list(rows)))
        half_loss, half = gradient(objective, part, rows)
        halves.append(half)
        per_sample.append(half_loss.per_sample)
    torch.testing.assert_close(torch.cat(per_sample), loss.per_sample, rtol=1e-6, atol=0)
    error = sum(((halves[0][key] + halves[1][key]) / 2 - value).square().sum() for key, value in whole.items())
    assert error.sqrt() < 1e-6 * sum(value.square().sum() for value in whole.values()).sqrt()


@every_method
def test_bfloat16_autocast_is_finite_and_close(make, name, options):
    objective = make(name, options)
    exact, _ = gradient(objective, batch_of(), range(8))

    def autocast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return objective.network(*args, **kwargs)

    objective.attach(autocast)
    loss, gradients = gradient(objective, batch_of(), range(8))
    assert loss.total.dtype == torch.float32
    assert all(value.isfinite().all() for value in gradients.values())
    torch.testing.assert_close(loss.total, exact.total, rtol=0.05, atol=0)


@every_objective
def test_denoiser_is_the_identity_at_its_floor(make, name, options):
    objective = make(name, options, dtype=torch.float64)
    x, floor = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.full((4,), objective.floor, dtype=torch.float64)
    denoised = objective.denoiser()(x, floor, of_classes(torch.arange(4)))
    assert torch.equal(denoised, x)
    assert not torch.equal(objective.denoiser()(x, floor + 0.01, of_classes(torch.arange(4))), x)


@every_objective
def test_gradient_flows_through_a_pass_of_the_network_and_no_target(make, name, options):
    objective = make(name, options)
    with_gradient = []

    def watched(*args, **kwargs):
        with_gradient.append(torch.is_grad_enabled())
        return objective.network(*args, **kwargs)

    objective.attach(watched)
    objective.loss(batch_of(), Draws(0, STEP, range(8))).total.backward()
    assert with_gradient.count(True) == objective.passes
    others = [*objective.auxiliary.values(), *([objective.teacher.network] if objective.teacher else [])]
    for network in others:
        assert network is not objective.network
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


@every_objective
def test_state_is_what_the_method_says(make, name, options):
    objective = make(name, options)
    assert set(objective.auxiliary) == ({"target"} if objective.has_target else set())
    weights = {p.data_ptr() for p in objective.network.parameters()}
    for network in objective.auxiliary.values():
        assert weights.isdisjoint(p.data_ptr() for p in network.parameters())


@every_method
def test_loss_uses_the_wrapped_network(make, name, options):
    objective = make(name, options)
    calls = []
    objective.attach(lambda *args, **kwargs: calls.append(args) or objective.network(*args, **kwargs))
    objective.loss(batch_of(), Draws(0, STEP, range(8)))
    assert calls


@every_method
@pytest.mark.parametrize(
    "channels, size, classes",
    narrowed([(1, (8, 16), 10), (4, (12, 4), None), (3, (8, 8), None)], (1, (8, 16), 10)),
)
def test_any_shape_trains_samples_and_survives_saving(make, name, options, channels, size, classes, tmp_path):
    if options.get("gan_weight") and min(size) < 8:
        pytest.skip("too small for the discriminator, which says so")
    objective = make(name, options, channels=channels, size=size, num_classes=classes)
    batch = batch_of(4, channels, size, classes)
    _, gradients = gradient(objective, batch, range(4))
    assert all(value.isfinite().all() for value in gradients.values())

    pipe = objective.pipeline(objective.network.eval())
    pipe.set_progress_bar_config(disable=True)
    labels = {"class_labels": [1, 7]} if classes else {}
    arguments = {"batch_size": 2, "num_inference_steps": 2, "output_type": "np", **labels}
    images = pipe(generator=torch.Generator().manual_seed(0), **arguments).images
    assert images.shape == (2, *size, channels)
    assert (images >= 0).all() and (images <= 1).all() and images.std() > 0

    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(pipe)
    again.set_progress_bar_config(disable=True)
    assert (again(generator=torch.Generator().manual_seed(0), **arguments).images == images).all()


@every_objective
def test_pipeline_carries_the_parameterisation(make, name, options):
    objective = make(name, options)
    config = objective.pipeline(objective.network).scheduler.config
    known = {"sigma_data": 0.5, "sigma_max": 80, "sigma_min": objective.sigma_min}
    assert {key: config[key] for key in objective.levels} == {key: known[key] for key in objective.levels}


@every_objective
def test_scheduler_of_the_pipeline_can_be_made_again_from_its_config(make, name, options):
    objective = make(name, options)
    scheduler = objective.pipeline(objective.network).scheduler
    again = type(scheduler).from_config(scheduler.config)
    settings = {key for key in scheduler.config if not key.startswith("_")}
    assert {key: again.config[key] for key in settings} == {key: scheduler.config[key] for key in settings}


@every_objective
def test_curricula_are_numbers(make, name, options):
    values = make(name, options).describe(STEP)
    assert all(isinstance(value, (int, float)) for value in values.values())


def test_every_kind_of_student_that_keeps_its_process_is_here():
    assert set(STUDENTS.values()) == {kind for cls in METHODS.values() for kind in cls.native_predictions}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_needs_a_teacher_says_so(name, make):
    cls = METHODS[name]
    assert issubclass(cls.Options, TeacherOptions) or not cls.needs_teacher
    network = make(name, OPTIONS.get(name, [{}])[0]).network
    if cls.needs_teacher:
        with pytest.raises(ValueError, match=f"{name} distils a teacher: give --pretrained_teacher_model"):
            cls(network, ModelSpec(0.5), cls.Options(), total_steps=10)


@pytest.mark.parametrize("name", METHODS)
def test_name_is_the_key(name):
    assert METHODS[name].name == name

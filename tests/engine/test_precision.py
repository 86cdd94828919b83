"""The precision of a run, which depends on its method, compiled runs, and the switches of a GPU's arithmetic."""

import copy
import functools
import os
import signal
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from sklearn.datasets import load_digits

import cm_diffusers.engine.training.run as run_module
from cm_diffusers.core.draws import Draws
from cm_diffusers.engine.checkpoint import load_checkpoint
from cm_diffusers.engine.config import RunArguments
from cm_diffusers.engine.training.divergence import Diverged
from cm_diffusers.engine.training.precision import CastPass, arithmetic, choose_precision
from cm_diffusers.models import JVPUNet2DModel, build_unet, keep_time_embedding_in_float32
from cm_diffusers.objectives import OBJECTIVES, Batch, Diffusion, ModelSpec
from tests.helpers.breadth import narrowed
from tests.helpers.training_runs import differences, read_log, run


SETTINGS = {
    "ecd": {"stage_steps": 1, "huber_c": 0.01},
    "ict": {"s0": 4, "s1": 16},
    "sct": {"model_preset": "jvp_tiny", "tangent_warmup_steps": 1},
    "scd": {"model_preset": "jvp_tiny", "tangent_warmup_steps": 1, "from_scratch": True},
    "mean_flow": {"model_preset": "jvp_tiny"},
    "ctm": {"solver_steps": 1, "gan_weight": 0.5, "discriminator_start_step": 1},
}
NEIGHBOURS = {"ct", "ict", "cd", "lcm", "tcd", "ect", "ecd", "ctm"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a briefly trained diffusion model."""
    return run(tmp_path_factory.mktemp("runs") / "teacher", "diffusion", max_train_steps=2) / "pipeline"


@pytest.fixture
def train(teacher, tmp_path):
    """A function that trains for two steps and returns the losses."""

    def make(name, method, **settings):
        if "pretrained_teacher_model" in OBJECTIVES[method].Options.__dataclass_fields__:
            settings["pretrained_teacher_model"] = teacher
        settings = {"max_train_steps": 2, **SETTINGS.get(method, {}), **settings}
        return [row["loss"] for row in read_log(run(tmp_path / name, method, **settings)) if row["loss"] is not None]

    return make


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces and wraps networks, but runs the traced operations unchanged, which is quick."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


# --- compiled ------------------------------------------------------------------------------------------------------


QUICK = ("cdm", "mean_flow")  # the others take a minute or more


def test_teacher_and_target_are_compiled_too(teacher, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(
        torch, "compile", lambda function: lambda *args, **kwargs: called.append(function) or function(*args, **kwargs)
    )
    run(tmp_path, "cd", pretrained_teacher_model=teacher, num_scales=4, max_train_steps=1, compile=True)
    assert len(called) == 4  # a Heun step of the teacher, the student and its target
    assert len({function.__self__ if hasattr(function, "__self__") else function for function in called}) == 3


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=pytest.mark.wide if method in QUICK else pytest.mark.slow) for method in OBJECTIVES],
)
def test_a_compiled_run_is_that_without(train, traced, method):
    assert train("compiled", method, compile=True) == pytest.approx(train("plain", method), rel=1e-5)


# --- the choice ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU with bf16 support, which the returned monkeypatch can change."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return monkeypatch


def test_methods_that_compare_neighbours_say_so():
    assert {name for name, method in OBJECTIVES.items() if method.compares_neighbours} == NEIGHBOURS


@pytest.mark.parametrize("method", OBJECTIVES.values())
@pytest.mark.parametrize("launcher", [None, "no"])
def test_on_a_gpu_the_method_chooses(gpu, method, launcher):
    if launcher:  # accelerate launch passes this on by default
        gpu.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert choose_precision(method, None) == ("fp16" if method.name in NEIGHBOURS else "bf16", None)


@pytest.mark.parametrize("method", OBJECTIVES.values())
def test_a_gpu_without_bf16_computes_in_fp16(gpu, method):
    gpu.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_precision(method, None) == ("fp16", None)


@pytest.mark.parametrize("asked", ["no", "fp16"])
def test_what_is_asked_for_wins(gpu, asked):
    gpu.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert choose_precision(OBJECTIVES["ect"], asked) == (asked, None)


@pytest.mark.parametrize("cpu", [{"ACCELERATE_USE_CPU": "true"}, None])
def test_without_a_gpu_all_is_float32(gpu, cpu):
    if cpu:
        gpu.setenv(*next(iter(cpu.items())))
    else:
        gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert {choose_precision(method, None) for method in OBJECTIVES.values()} == {("no", None)}


@pytest.mark.parametrize("method", OBJECTIVES.values())
@pytest.mark.parametrize("by", ["flag", "launcher"])
def test_bf16_is_warned_of_where_it_does_harm_and_taken_all_the_same(monkeypatch, method, by):
    if by == "launcher":
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    precision, warning = choose_precision(method, "bf16" if by == "flag" else None)
    assert precision == "bf16"
    if method.name not in NEIGHBOURS:
        assert warning is None
    else:
        assert (
            warning.startswith(f"{method.name} compares") and "0.81" in warning and "with fp16 it was 0.99" in warning
        )


@pytest.fixture
def accelerate():
    """Reset accelerate's precision, which is set once per process, before and after the test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("asked, warnings, said", [("bf16", 1, "bf16"), (None, 0, "float32")])
def test_a_run_says_its_precision_and_warns_once(accelerate, tmp_path, capfd, asked, warnings, said):
    run(tmp_path, "ect", max_train_steps=1, mixed_precision=asked)
    text = "".join(capfd.readouterr())
    assert text.count("WARNING: ect compares") == text.count("WARNING") == warnings
    assert f"Precision: {said}\n" in text


# --- effect on gradients -------------------------------------------------------------------------------------------


LABELS = {"edm": "log_sigma", "trigflow": "angle", "flow": "flow_time"}


@functools.cache
def digits():
    """Digits (1797, 1, 8, 8) in [-1, 1]."""
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


@functools.cache
def diffusion_model(prediction):
    """A briefly trained network of a diffusion model, and its spec."""
    torch.manual_seed(0)
    network = build_unet("tiny" if prediction == "edm" else "jvp_tiny", (8, 8), 1)
    keep_time_embedding_in_float32(network)
    spec = ModelSpec(0.5, LABELS[prediction], prediction=prediction)
    objective = Diffusion(network, spec, Diffusion.Options(prediction), 100)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(60):
        rows = range(32 * (step % 50), 32 * (step % 50) + 32)
        objective.loss(Batch(digits()[rows]), Draws(0, step, rows)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, spec


def gradient(name, step, dtype, seed=1, **options):
    """The gradient of a method at `step` of 8000, with passes cast to `dtype`."""
    network, spec = diffusion_model({"sct": "trigflow", "mean_flow": "flow"}.get(name, "edm"))
    cls = OBJECTIVES[name]
    torch.manual_seed(0)  # for the new layers of a second time
    trained = cls.adapt(copy.deepcopy(network), spec)
    objective = cls(trained, spec, cls.Options(**options), 8000)
    objective.attach(CastPass(trained))
    if dtype != torch.float32:
        objective.model.forward = torch.autocast("cpu", dtype)(objective.model.forward)
    loss = objective.loss(Batch(digits()[:48]), Draws(seed, step, range(48))).total
    for scale in (1024, 32, 1) if dtype == torch.float16 else (1,):  # as by a gradient scaler
        (loss * scale).backward(retain_graph=True)
        vector = torch.cat([p.grad.flatten() for p in trained.parameters() if p.grad is not None])
        if vector.isfinite().all():
            return vector
        trained.zero_grad()


def cosine(name, step, dtype, **options):
    """Cosine similarity of the gradients with passes in float32 and in `dtype`."""
    gradients = (gradient(name, step, kind, **options) for kind in (torch.float32, dtype))
    return torch.cosine_similarity(*gradients, dim=0).item()


ECT = {"pretrain_steps": 0, "stage_steps": 100}


@pytest.mark.parametrize(
    "name, early, late, options", [("ect", 0, 900, ECT), pytest.param("ict", 0, 7000, {}, marks=pytest.mark.wide)]
)
def test_late_comparisons_of_neighbours_need_the_bits_of_fp16(name, early, late, options):
    assert cosine(name, early, torch.bfloat16, **options) > 0.999
    bf16, fp16 = (
        [cosine(name, late, kind, seed=seed, **options) for seed in (1, 2, 3)]
        for kind in (torch.bfloat16, torch.float16)
    )
    assert min(fp16) > 0.98 and min(bf16) < 0.99
    assert all(1 - coarse > 5 * (1 - fine) for coarse, fine in zip(bf16, fp16))


@pytest.mark.parametrize("name", narrowed(["diffusion", "cdm", "sct", "mean_flow"], "diffusion", "sct"))
def test_methods_without_neighbours_keep_their_gradient_in_bf16(name):
    options = {"tangent_warmup_steps": 1} if name == "sct" else {}
    assert cosine(name, 4000, torch.bfloat16, **options) > 0.999


# --- tangents ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", narrowed(["sct", "scd", "mean_flow"], "sct"))
@pytest.mark.parametrize("compiled", [False, True])
def test_tangents_are_float32_and_the_pass_that_is_trained_is_cast(
    train, accelerate, traced, monkeypatch, method, compiled
):
    seen, forward = set(), JVPUNet2DModel.forward

    def spy(self, *args, **kwargs):
        if self.training:  # skip the teacher
            cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
            seen.add((torch.is_grad_enabled(), cast))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(JVPUNet2DModel, "forward", spy)
    if compiled:  # without tracing, which would bypass the spy

        def wrapped(part):
            return torch._dynamo.OptimizedModule(part, lambda f: f) if isinstance(part, torch.nn.Module) else part

        monkeypatch.setattr(torch, "compile", wrapped)
    train("run", method, mixed_precision="bf16", compile=compiled)
    assert seen == {(False, torch.float32), (True, torch.bfloat16)}


def test_fp16_is_refused_on_a_cpu_where_it_would_be_float32(tmp_path):
    with pytest.raises(ValueError, match="mixed_precision fp16 needs a GPU. On a CPU leave it out"):
        run(tmp_path, mixed_precision="fp16")


# --- fp16 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fp16(accelerate, monkeypatch):
    """A function of the initial scale, after which runs compute in fp16 with a gradient scaler, as on a GPU."""
    start = run_module.start_accelerator

    def patch(scale):
        def start_with_scaler(**settings):
            accelerator = start(**settings)
            accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
            return accelerator

        monkeypatch.setattr(run_module, "choose_precision", lambda method, asked: (None, None))
        monkeypatch.setattr(run_module, "start_accelerator", start_with_scaler)

    return patch


def states(folder):
    """For each step: the weights in one vector, and the scale."""
    count = len(list(folder.glob("checkpoint-*")))
    read = [load_checkpoint(folder / f"checkpoint-{step}") for step in range(1, count + 1)]
    weights = [torch.cat([v.flatten() for _, v in sorted(c.tensors["model"].items())]) for c in read]
    return weights, [c.state["scaler"]["scale"] for c in read]


SAVES = {"checkpointing_steps": 1, "checkpoints_total_limit": 20}


def test_fp16_takes_the_steps_of_float32(fp16, tmp_path):
    run(tmp_path / "full", max_grad_norm=1.0)
    fp16(256.0)
    run(tmp_path / "half", max_grad_norm=1.0)
    full, half = (read_log(tmp_path / name) for name in ("full", "half"))
    for key in ("loss", "grad_norm"):  # neither contains the scale
        assert [row[key] for row in half] == pytest.approx([row[key] for row in full], rel=0.01)
    assert [row["skipped"] for row in half] == [0] * 6


def test_a_stopped_run_in_fp16_is_resumed_bit_for_bit_with_its_scale(fp16, tmp_path, monkeypatch):
    fp16(256.0)
    run(tmp_path / "whole", **SAVES)
    loss = OBJECTIVES["ect"].loss

    def loss_with_signal(self, batch, draws):
        if draws.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(OBJECTIVES["ect"], "loss", loss_with_signal)
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped", **SAVES)
    run(tmp_path / "stopped", **SAVES)
    assert states(tmp_path / "stopped")[1] == states(tmp_path / "whole")[1] == [256, 512, 512, 1024, 1024, 2048]
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


@pytest.mark.wide
def test_a_scale_that_is_too_high_is_lowered_and_ends_no_run(fp16, tmp_path):
    fp16(2.0**22)
    run(tmp_path, max_train_steps=12, max_skipped_steps=0, **SAVES)
    skipped = [row["skipped"] for row in read_log(tmp_path)]
    weights, scales = states(tmp_path)
    assert skipped[:2] == [1, 2] and skipped[-1] < 12
    for step in range(1, 12):
        left_out = skipped[step] > skipped[step - 1]
        assert torch.equal(weights[step], weights[step - 1]) == left_out
        assert (scales[step] < scales[step - 1]) == left_out


def test_a_loss_that_is_not_finite_ends_a_run_in_fp16_whatever_the_scale(fp16, tmp_path, monkeypatch):
    fp16(256.0)
    loss = OBJECTIVES["ect"].loss

    def broken(self, batch, draws):
        result = loss(self, batch, draws)
        return replace(result, total=result.total * (1 if draws.step < 2 else float("nan")))

    monkeypatch.setattr(OBJECTIVES["ect"], "loss", broken)
    with pytest.raises(Diverged, match="3 steps in a row"):
        run(tmp_path, max_skipped_steps=2)


def test_a_norm_that_overflows_moves_no_weight_though_each_gradient_is_finite(fp16, tmp_path, monkeypatch):
    fp16(256.0)
    norms = iter([1.0, float("inf"), 1.0])
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(next(norms)))
    run(tmp_path, max_train_steps=3, **SAVES)
    weights, _ = states(tmp_path)
    assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[2], weights[1])
    assert [row["skipped"] for row in read_log(tmp_path)] == [0, 1, 1]


# --- the arithmetic of a GPU ---------------------------------------------------------------------------------------


def switches():
    """The switches of torch, and the variable that cuBLAS reads."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return {
        "benchmark": cudnn.benchmark,
        "deterministic": (cudnn.deterministic, *algorithms, os.environ.get("CUBLAS_WORKSPACE_CONFIG")),
        "tf32": (matmul.allow_tf32, cudnn.allow_tf32),
    }


FAST = {"benchmark": True, "deterministic": (False, False, False, None), "tf32": (True, True)}
EXACT = {"benchmark": False, "deterministic": (True, True, False, ":4096:8"), "tf32": (False, False)}


@pytest.mark.parametrize(
    "asked, expected",
    [
        ({}, FAST),
        ({"allow_tf32": True}, FAST),
        ({"allow_tf32": False}, FAST | {"tf32": (False, False)}),
        ({"deterministic": True}, EXACT),
        ({"deterministic": True, "allow_tf32": True}, EXACT),
    ],
)
def test_a_run_sets_the_switches_of_a_gpu_and_puts_them_back(asked, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before, seen, start = switches(), [], run_module.start_accelerator
    monkeypatch.setattr(run_module, "start_accelerator", lambda **given: seen.append(switches()) or start(**given))
    monkeypatch.setattr(run_module, "_export", lambda *args, **given: seen.append(switches()))
    run(tmp_path, "ect", max_train_steps=1, pretrain_steps=0, stage_steps=1, **asked)
    assert seen == [expected, expected] and before not in seen and switches() == before


def test_the_switches_are_put_back_after_an_error_and_a_workspace_of_the_user_is_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = switches()
    with pytest.raises(KeyError), arithmetic(RunArguments(deterministic=True)):
        assert switches() == EXACT | {"deterministic": (True, True, False, ":16:8")}
        raise KeyError
    assert switches() == before


@pytest.mark.parametrize("method", narrowed(OBJECTIVES, "ect"))
def test_every_method_has_repeatable_algorithms_on_a_cpu(train, method):
    assert train("exact", method, deterministic=True) == train("plain", method)

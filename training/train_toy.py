"""Train a method on a small problem, whose exact answer is known on the line, and draw what it learns.

    python training/train_toy.py --task bimodal --method scd --output_dir runs/toy
    python training/train_toy.py --task three_gmm --method ctm --output_dir runs/toy_ctm

Leaves toy.png and report.json: on the line `rms_error` (root mean square distance of the learned function from the
exact one over the noise marginal) and, for ctm, `wasserstein` by sampler (see toy_ctm.py). Takes a minute or two on
one core.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import toy_ctm
from torch import Tensor
from tqdm.auto import trange

from cm_diffusers.core.ema import EMA, HalfLife
from cm_diffusers.core.tangents import jvp
from cm_diffusers.engine.places import make_folder
from cm_diffusers.engine.processes import ends_with_a_line
from cm_diffusers.objectives import OBJECTIVES, Batch, ModelSpec, Objective
from cm_diffusers.toys import TASKS, Mixture, Shape, ToyDraws, ToyNetwork


# settings of each method here; tangents are not normalised: on a line that would make a median of the mean (sCT)
OPTIONS = {
    "diffusion": {"interpolant": "trigflow", "p_mean": -0.4, "p_std": 1.6},
    "sct": {"p_std": 1.6, "tangent_warmup_steps": 1000, "tangent_norm": "none"},
    "scd": {"p_std": 1.6, "tangent_warmup_steps": 1000, "tangent_norm": "none"},
    "ctm": {"num_scales": 40, "solver_steps": 3},
}
SIGMA_MAX = 80.0


def train(
    method: str,
    task: Mixture | Shape,
    steps: int,
    args: argparse.Namespace,
    network: ToyNetwork,
    teacher: Callable | None = None,
    **options,
) -> Objective:
    """Train `network` in place; gives the objective, driving an average of the weights."""
    cls = OBJECTIVES[method]
    options = cls.Options(**OPTIONS[method] | options)
    spec = ModelSpec(task.sigma_data, "angle", SIGMA_MAX, prediction=cls.prediction(options))
    objective = cls(network, spec, options, steps, pretrained=teacher is not None, teacher=teacher)
    optimizer = torch.optim.RAdam(network.parameters(), args.learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    ema = EMA(network, [HalfLife(500)])
    for step in trange(steps, desc=method):
        draws = ToyDraws(args.seed, step, range(args.batch_size))
        optimizer.zero_grad()
        objective.loss(Batch(task.sample(draws)), draws).total.backward()
        optimizer.step()
        schedule.step()
        objective.after_step(step)
        ema.update((step + 1) * args.batch_size, args.batch_size)
    network.load_state_dict(next(iter(ema.shadows.values())))
    return objective


def exact(method: str, task: Mixture, x: Tensor, sigma: Tensor, floor: float = 0.0) -> Tensor:
    """What the method should learn: the posterior mean, or the consistency function, to the level `floor`."""
    if method == "diffusion":
        return task.denoised(x, sigma)
    return task.jump(x, sigma, torch.full_like(sigma, floor)).to(x)


def total_derivative(objective: Objective, task: Mixture, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative by the angle of the learned function along exact trajectories: as a tangent, and as a difference
    of two of their points. `x` (B, 1, 1, 1) in VE's scale at the angle t (B,)."""
    sigma_data, denoiser = objective.spec.sigma_data, objective.denoiser()
    sigma, speed = sigma_data * t.tan(), sigma_data / t.cos() ** 2
    slope = (x - task.denoised(x, sigma)) / sigma.reshape(-1, 1, 1, 1)
    tangent = jvp(denoiser, (x, sigma), (slope * speed.reshape(-1, 1, 1, 1), speed))[1]
    step, ends = 0.005, []
    for side in (t + step, t - step):
        there = sigma_data * side.clamp(1e-3, 1.569).tan()
        with torch.no_grad():
            ends.append(denoiser(task.jump(x, sigma, there).float(), there))
    return tangent, (ends[0] - ends[1]) / (2 * step)


def report(method: str, task: Mixture | Shape, objective: Objective) -> dict[str, float]:
    """Distances from the exact function, if any, over the noise marginal and for one step from pure noise."""
    if isinstance(task, Shape):
        return {}
    n, denoiser, draws = 20_000, objective.denoiser(), ToyDraws(1, 0, range(20_000))
    x0 = task.sample(draws)
    noise = draws.normal("noise", (1, 1, 1))
    errors = {}
    for name, sigma in (("", (-1 + 1.6 * draws.normal("sigma")).exp()), ("one_step_", torch.full((n,), SIGMA_MAX))):
        x = x0 + sigma.reshape(-1, 1, 1, 1) * noise
        with torch.no_grad():
            difference = denoiser(x, sigma) - exact(method, task, x, sigma, objective.floor)
        errors[f"{name}rms_error"] = round(difference.square().mean().sqrt().item(), 5)
    return errors


def draw(method: str, task: Mixture, objective: Objective, path: Path) -> None:
    """Trajectories, predictions along them, maps of prediction, error and derivatives over angle and position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sigma_data, denoiser = objective.spec.sigma_data, objective.denoiser()
    angles, positions = torch.linspace(0.02, 1.56, 120), torch.linspace(-1.5, 1.5, 121)
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex=True)

    starts = torch.linspace(-1.2, 1.2, 17)
    sigmas = sigma_data * angles.tan()
    top = (starts / angles[-1].cos()).reshape(-1, 1, 1, 1)
    for start in top:
        x = task.jump(start.expand(len(angles), 1, 1, 1), sigmas[-1].expand(len(angles)), sigmas).float()
        with torch.no_grad():
            along = denoiser(x, sigmas)
        axes[0, 0].plot(angles, x.flatten() * angles.cos(), "C0", linewidth=0.8)
        axes[0, 1].plot(angles, along.flatten(), "C1", linewidth=0.8)
    axes[0, 0].set(title="exact trajectories", ylabel="x_t = cos(t) x0 + sin(t) z")
    axes[0, 1].set(title="what the model makes of them (flat if consistent)", ylabel="f(x_t, t)")

    t = angles.repeat_interleave(len(positions))
    x = (positions.repeat(len(angles)) / t.cos()).reshape(-1, 1, 1, 1)
    sigma = sigma_data * t.tan()
    with torch.no_grad():
        learned = denoiser(x, sigma)
    tangent, numeric = total_derivative(objective, task, x, t)
    maps = {
        "learned f(x_t, t)": (axes[0, 2], learned, 1.0),
        "learned less exact": (axes[1, 0], learned - exact(method, task, x, sigma), 0.2),
        "tangent df/dt": (axes[1, 1], tangent, 1.0),
        "difference of neighbours": (axes[1, 2], numeric, 1.0),
    }
    for title, (axis, values, reach) in maps.items():
        grid = values.reshape(len(angles), len(positions)).T
        image = axis.pcolormesh(angles, positions, grid, cmap="RdBu_r", vmin=-reach, vmax=reach)
        axis.set(title=title, xlabel="angle t", ylabel="x_t")
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="bimodal", help="the data")
    add("--method", choices=list(OPTIONS), default="scd", help="what is trained")
    add(
        "--teacher",
        choices=["trained", "exact", "none"],
        help="scd's and ctm's: a diffusion model, from which the student starts (the default), the exact answer, or"
        " (ctm) none",
    )
    add(
        "--max_train_steps",
        type=int,
        default=3000,
        help="steps of the method, and before them as many of its teacher; ctm takes both itself without one (3000)",
    )
    add("--batch_size", type=int, default=512, help="points per step (512)")
    add("--learning_rate", type=float, default=2e-3, help="peak learning rate (2e-3)")
    add("--seed", type=int, default=0, help="every random number follows from it (0)")
    add("--output_dir", type=Path, default=Path("runs/toy"), help="leaves report.json and toy.png here")
    args = parser.parse_args(argv)
    task, taught = TASKS[args.task], args.method in ("scd", "ctm")
    if args.teacher not in (None, "none") and not taught:
        parser.error(f"teacher has no effect: {args.method} has none; it is for --method scd and ctm.")
    args.teacher = args.teacher or "trained"
    if isinstance(task, Shape) and (args.method != "ctm" or args.teacher == "exact"):
        parser.error(f"{args.task} has no exact answer; it is for --method ctm with --teacher trained or none.")
    if args.method == "scd" and args.teacher == "none":
        parser.error("scd distils a teacher; --teacher none is for ctm.")
    try:
        make_folder(args.output_dir)
    except ValueError as error:
        parser.error(str(error))

    start, steps = time.perf_counter(), args.max_train_steps
    torch.manual_seed(args.seed)
    two_times = OBJECTIVES[args.method].two_times
    network = ToyNetwork(task.dimensions, two_times, depth=5 if two_times else 3)  # jumps are harder to learn
    result, teacher, options = {"task": args.task, "method": args.method, "seed": args.seed}, None, {}
    if taught:
        result["teacher"] = args.teacher
        options["pretrained_teacher_model"] = None if args.teacher == "none" else args.teacher
    if taught and args.teacher == "trained":
        interpolant = "edm" if args.method == "ctm" else "trigflow"
        trained = train("diffusion", task, steps, args, network, interpolant=interpolant)
        result["teacher_errors"] = report("diffusion", task, trained)
        teacher = trained.denoiser(copy.deepcopy(network).requires_grad_(False))
    elif taught and args.teacher == "exact":
        teacher = task
    elif taught:  # a quarter of the run gives the model a denoiser, whose trajectories it then learns
        steps, options["pretrain_steps"] = 2 * steps, steps // 2
    objective = train(args.method, task, steps, args, network, teacher, **options)
    result |= report(args.method, task, objective)
    picture = args.output_dir / "toy.png"
    if args.method == "ctm":
        pipe = toy_ctm.pipeline(objective)
        samples = toy_ctm.draw_samples(pipe, task, toy_ctm.SAMPLES)
        result["wasserstein"] = toy_ctm.distances(samples)
        toy_ctm.picture(pipe, task, samples, picture)
    else:
        draw(args.method, task, objective, picture)
    result["seconds"] = round(time.perf_counter() - start, 1)
    (args.output_dir / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"Saved {args.output_dir / 'report.json'} and {picture}.")


if __name__ == "__main__":
    with ends_with_a_line(then="give the same command again"):
        main()

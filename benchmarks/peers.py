"""Compare our training step with that of two public repositories: ratios of times, and numbers from equal inputs.

    python benchmarks/peers.py --openai <checkout of openai/consistency_models> --diffusers <checkout of diffusers>

The script runs on the CPU. It imports their code from the checkouts, unchanged. Packages that their code imports but
these comparisons do not need (MPI, LPIPS, torchvision and others) are replaced by empty modules. All networks are a
stock `UNet2DModel` of the same shape and weights: preset `small`, images of 28x28, batch 64. See peers.md.
"""

import argparse
import copy
import importlib
import math
import sys
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from accelerate import Accelerator
from common import paired, show
from step_cost import BATCH, build_trainer
from torch import Tensor, nn

from cm_diffusers.core.conditions import of_classes
from cm_diffusers.core.denoisers import EDMDenoiser
from cm_diffusers.core.karras import karras_sigmas
from cm_diffusers.core.noise_levels import lognormal_bins, uniform_bins
from cm_diffusers.core.schedules import ct_scales, ct_target_decay, ict_scales
from cm_diffusers.core.time_labels import TIME_LABELS
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.objectives import CD, CT, ICT, Batch, ModelSpec, Objective


SIGMA_DATA = 0.5
STEPS = 10_000
SCRIPT = "examples/research_projects/consistency_training"


def import_peer(folder: Path, module: str, absent: list[str]) -> ModuleType:
    """Import `module` from the checkout `folder`, with empty modules in place of those named in `absent`."""
    sys.path.insert(0, str(folder))
    sys.modules.update({name: mock.MagicMock() for name in absent})
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))
        for name in absent:
            del sys.modules[name]


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference between `a` and `b`, relative to `b`."""
    return ((a - b).abs() / b.abs()).max().item()


# --- equal inputs ----------------------------------------------------------------------------------------------


class Given:
    """A stand-in for `Draws`: given noise, and uniform numbers that fall into the given bins of `law`."""

    def __init__(self, law: Tensor, bins: Tensor, noise: Tensor, step: int = 0):
        self.law, self.bins, self.noise, self.step = law, bins, noise, step

    def uniform(self, name: str) -> Tensor:
        return (self.law.cumsum(0) - self.law / 2)[self.bins]

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.noise

    def dropout(self) -> nullcontext:
        return nullcontext()


def inputs(network: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    """A copy of the network with random weights in all layers, and a batch."""
    torch.manual_seed(1)
    network = copy.deepcopy(network).to(dtype)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network, Batch(torch.rand(BATCH, 1, 28, 28, dtype=dtype) * 2 - 1, of_classes(torch.arange(BATCH) % 10))


def gradient(network: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([g.flatten().double() for g in gradients])


# --- openai/consistency_models ---------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A `UNet2DModel` with the call signature of that repository's networks."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        return self.unet(x, timesteps, class_labels=y).sample


class OpenAI:
    """The training loop and the losses of the checkout."""

    def __init__(self, folder: Path, scratch: str):
        absent = ["blobfile", "mpi4py", "piq", "torchvision", "torchvision.transforms"]
        self.loop = import_peer(folder, "cm.train_util", absent)
        self.script = import_peer(folder, "cm.script_util", absent)
        self.loop.logger.configure(dir=scratch, format_strs=[])
        self.loop.dist = SimpleNamespace(get_world_size=lambda: 1, get_rank=lambda: 0)  # one process without MPI
        self.loop.dist_util.sync_params = lambda parameters: None

    def denoiser(self, sigma_data: float, weights: str = "uniform", distillation: bool = True):
        return self.script.KarrasDenoiser(
            sigma_data=sigma_data, weight_schedule=weights, distillation=distillation, loss_norm="l2"
        )

    def curricula(self, name: str):
        """Their mu(k) and N(k), as in their launch script: growing for ct, fixed for cd."""
        modes = ("adaptive", 0.95, "progressive", 2, 150) if name == "ct" else ("fixed", 0.95, "fixed", 40, 40)
        return self.script.create_ema_and_scales_fn(*modes, STEPS, 0)

    def step(self, name: str, network: nn.Module, sigma_data: float):
        """A function that takes one step of their training loop."""
        teacher = Wrapped(copy.deepcopy(network)) if name == "cd" else None
        batch = torch.rand(BATCH, 1, 28, 28) * 2 - 1
        loop = self.loop.CMTrainLoop(
            model=Wrapped(copy.deepcopy(network)),
            target_model=Wrapped(copy.deepcopy(network)),
            teacher_model=teacher,
            teacher_diffusion=self.denoiser(sigma_data, distillation=False),
            training_mode="consistency_distillation" if teacher else "consistency_training",
            ema_scale_fn=self.curricula(name),
            total_training_steps=STEPS,
            diffusion=self.denoiser(sigma_data),
            data=None,
            batch_size=BATCH,
            microbatch=-1,
            lr=1e-4,
            ema_rate="0.9999",
            log_interval=STEPS,
            save_interval=STEPS,
            resume_checkpoint="",
        )
        pairs = list(loop.target_model.parameters()), list(loop.model.parameters())

        @torch.no_grad()
        def update_target() -> None:  # outside float16 theirs pairs flat tensors with shaped ones, and fails
            self.loop.update_ema(*pairs, rate=loop.ema_scale_fn(loop.global_step)[0])

        loop._update_target_ema = update_target
        return lambda: loop.run_step(batch, {"y": torch.arange(BATCH) % 10})

    def numbers(self, name: str, network: nn.Module, dtype: torch.dtype, weights: str = "uniform") -> dict:
        """Relative differences of loss and gradient from equal inputs; theirs times the number of pixels."""
        network, batch = inputs(network, dtype)
        distilled = {"pretrained_teacher_model": "given", "num_scales": 18} if name == "cd" else {}
        cls: type[Objective] = {"ct": CT, "cd": CD}[name]
        teacher = EDMDenoiser(inputs(network, dtype)[0].requires_grad_(False), SIGMA_DATA) if name == "cd" else None
        ours = cls(network, ModelSpec(SIGMA_DATA), cls.Options(weighting=weights, **distilled), STEPS, teacher=teacher)
        with torch.no_grad():  # makes the three networks differ
            torch._foreach_mul_(list(ours.target.parameters()), 0.9)
            torch._foreach_mul_(list(teacher.network.parameters()) if teacher else [torch.ones(())], 1.1)
        step = 100  # CT's grid has 16 levels there
        scales = 18 if name == "cd" else ours.scales(step)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            noise = torch.randn_like(batch.samples)
            torch.manual_seed(2)
            indices = torch.randint(0, scales - 1, (BATCH,))
            torch.manual_seed(2)
            theirs = self.denoiser(SIGMA_DATA, weights).consistency_losses(
                Wrapped(network),
                batch.samples,
                scales,
                model_kwargs={"y": batch.condition.entries["class_labels"]},
                target_model=Wrapped(ours.target),
                teacher_model=Wrapped(teacher.network) if teacher else None,
                teacher_diffusion=self.denoiser(SIGMA_DATA, distillation=False),
                noise=noise,
            )["loss"]
        finally:
            torch.set_default_dtype(previous)
        sigmas = karras_sigmas(scales).flip(0)
        bins = scales - 2 - indices  # their indices count from the noisy end
        loss = ours.loss(batch, Given(uniform_bins(sigmas), bins, noise, step))
        pixels = batch.samples[0].numel()
        a, b = gradient(network, pixels * theirs.mean()), gradient(network, loss.total)
        level = (sigmas[bins] / sigmas[bins + 1]) ** 2 if weights == "snr" else 1
        return {
            "loss": relative(pixels * theirs.detach(), loss.per_sample),
            "loss_with_the_weight_at_the_same_level": relative(pixels * theirs.detach(), level * loss.per_sample),
            "gradient": ((a - b).norm() / b.norm()).item(),
        }

    def curricula_differ(self) -> dict:
        """The number of training steps in which N(k) differs, and the largest relative difference of mu(k)."""
        theirs = [self.curricula("ct")(k) for k in range(STEPS)]
        ours = [ct_scales(k, STEPS) for k in range(STEPS)]
        decays = [abs(mu - ct_target_decay(n)) / mu for (mu, _), n in zip(theirs, ours)]
        return {"scales": sum(n != m for (_, n), m in zip(theirs, ours)), "mu": max(decays)}


# --- diffusers' script -----------------------------------------------------------------------------------------


class Images:
    """A stand-in for a dataset: it returns rows in order, whatever the index, and seeds torch after each batch."""

    def __init__(self, batch: Batch):
        self.batch, self.count = batch, 0

    def __len__(self) -> int:
        return BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, self.count = self.count % BATCH, self.count + 1
        if row == BATCH - 1:
            torch.manual_seed(2)
        return {"images": self.batch.samples[row], "class_labels": self.batch.condition.entries["class_labels"][row]}

    def set_transform(self, transform: object) -> None:
        pass


class Script:
    """The script's `main` in a separate thread, which waits after each step for the next call of `step`."""

    def __init__(self, folder: Path, network: nn.Module, batch: Batch, scratch: str):
        self.module = import_peer(folder / SCRIPT, "train_cm_ct_unconditional", ["torchvision"])
        network.save_pretrained(f"{scratch}/start/unet")
        flags = f"--dataset_name given --pretrained_model_name_or_path {scratch}/start --output_dir {scratch}/run"
        flags += f" --class_conditional --num_classes 10 --resolution 28 --train_batch_size {BATCH} --use_ema"
        flags += f" --optimizer_type radam --max_train_steps {STEPS}"
        flags += f" --checkpointing_steps {STEPS + 1} --validation_steps {STEPS + 1}"
        with mock.patch.object(sys, "argv", ["script", *flags.split()]):
            args = self.module.parse_args()
        args.report_to = None  # no tracker
        self.module.load_dataset = lambda *_, **__: Images(batch)
        self.module.resolve_interpolation_mode = mock.MagicMock()
        self.module.tqdm = lambda *_, **__: SimpleNamespace(update=lambda n: None, set_postfix=self._wait)
        self.loss, self.go, self.done = math.nan, threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self.module.main, args=(args,), daemon=True).start()
        self.done.acquire()

    def _wait(self, loss: float, **logs: object) -> None:
        self.loss = loss
        self.done.release()
        self.go.acquire()

    def step(self) -> None:
        self.go.release()
        self.done.acquire()


def ict_loss(network, batch, noise, u, t, c, c_in_without_root=False, their_boundary=False, by_pixel=False) -> Tensor:
    """iCT's loss, optionally with the script's three deviations from the paper."""

    def denoise(sigma: Tensor) -> Tensor:
        sigma = sigma[:, None, None, None]
        norm, shifted = (sigma**2 + SIGMA_DATA**2).sqrt(), sigma - 0.002
        c_skip, c_out = SIGMA_DATA**2 / (shifted**2 + SIGMA_DATA**2), shifted * SIGMA_DATA / norm
        if their_boundary:
            c_skip, c_out = SIGMA_DATA**2 / norm**2, sigma / norm
        x, label = batch.samples + sigma * noise, TIME_LABELS["log_sigma"].from_sigma(sigma.flatten(), SIGMA_DATA)
        c_in = 1 / norm**2 if c_in_without_root else 1 / norm
        return (
            c_skip * x + c_out * network(c_in * x, label, class_labels=batch.condition.entries["class_labels"]).sample
        )

    squared = (denoise(t) - denoise(u).detach()).flatten(1).square()
    distance = ((squared + c**2).sqrt() - c).mean(1) if by_pixel else (squared.sum(1) + c**2).sqrt() - c
    return (distance / (t - u)).mean()


def script_numbers(script: Script, network: nn.Module, batch: Batch) -> dict:
    """Compare the script's first loss with ours from equal inputs, and with ours after each deviation is added."""
    levels = script.module.get_karras_sigmas(11)
    weights = script.module.get_discretized_lognormal_weights(levels)
    torch.manual_seed(2)
    bins, noise = torch.multinomial(weights, BATCH, replacement=True), torch.randn(batch.samples.shape)
    sigmas = karras_sigmas(11).flip(0)
    law = lognormal_bins(sigmas, -1.1, 2.0)
    ours = ICT(network, ModelSpec(SIGMA_DATA), ICT.Options(), STEPS).loss(batch, Given(law, bins, noise)).total
    points = (network, batch, noise, sigmas[bins].float(), sigmas[bins + 1].float(), 0.00054 * 28)
    losses = {
        "ours": ours,
        "ours_from_the_formula": ict_loss(*points),
        "with_huber_by_pixel": ict_loss(*points, by_pixel=True),
        "and_their_c_skip_c_out": ict_loss(*points, by_pixel=True, their_boundary=True),
        "and_their_c_in": ict_loss(*points, by_pixel=True, their_boundary=True, c_in_without_root=True),
    }
    over_theirs = {name: loss.item() / script.loss for name, loss in losses.items()}
    gradients = {name: gradient(network, loss) for name, loss in losses.items()}
    cosines = {name: torch.cosine_similarity(g, gradients["ours"], dim=0).item() for name, g in gradients.items()}
    scales = [script.module.get_discretization_steps(k, STEPS) != ict_scales(k, STEPS) for k in range(STEPS)]
    return {
        "loss_over_theirs": over_theirs,
        "cosine_of_gradient_with_ours": cosines,
        "law_of_levels": relative(weights.double() / weights.double().sum(), law),
        "steps_with_other_scales": sum(scales),
    }


# --- the comparison --------------------------------------------------------------------------------------------


def main(openai: Path | None, diffusers: Path | None, rounds: int) -> None:
    accelerator, rows = Accelerator(cpu=True), {}
    with tempfile.TemporaryDirectory() as scratch:
        trainers = {}
        for name in ["ct", "cd"] * (openai is not None) + ["ict"] * (diffusers is not None):
            Path(scratch, name).mkdir()
            trainers[name] = build_trainer(name, f"{scratch}/{name}", accelerator)

        def times(name: str, theirs) -> dict:
            trainer = trainers[name]
            batches = trainer.data.batches(trainer.share, 0)
            return paired(lambda: trainer.take_step(batches, Stopping()), {"theirs": theirs}, rounds)

        if openai is not None:
            peer, network = OpenAI(openai, scratch), trainers["ct"].objective.network
            for name in ("ct", "cd"):
                numbers = {str(dtype): peer.numbers(name, network, dtype) for dtype in (torch.float64, torch.float32)}
                numbers["torch.float64, snr"] = peer.numbers(name, network, torch.float64, "snr")
                spec, start = trainers[name].objective.spec, trainers[name].objective.network
                rows[f"openai {name}"] = times(name, peer.step(name, start, spec.sigma_data)) | {"numbers": numbers}
            rows["openai ct"]["curricula"] = peer.curricula_differ()
        if diffusers is not None:
            network, batch = inputs(trainers["ict"].objective.network, torch.float32)
            script = Script(diffusers, network, batch, scratch)
            numbers = script_numbers(script, network, batch)
            rows["diffusers ict"] = times("ict", script.step) | {"numbers": numbers}
    show(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openai", type=Path, help="checkout of openai/consistency_models")
    parser.add_argument("--diffusers", type=Path, help="checkout of huggingface/diffusers")
    parser.add_argument("--rounds", type=int, default=20, help="number of paired timings (default: 20)")
    args = parser.parse_args()
    main(args.openai, args.diffusers, args.rounds)

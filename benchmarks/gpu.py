"""What a training run costs on one GPU, beside plain torch, in a few minutes.

    python benchmarks/gpu.py --budget 150 --out gpu.json
    python benchmarks/gpu.py --tiny --out gpu.json        # small networks and images: under two minutes on a CPU

The file is a JSON list of objects, one for each measurement, each with `section` and `name`. A case that fails is an
object with `error`. No section starts after the budget, and no long case either.

waits      for each method: how often a step of the real loop waits for the device between two lines of the log
           (`waits_per_step`, and where), and for how long it holds the host (`host_ms`; on a CPU the whole step)
steps      whole steps of the real loop, compiled or not, beside the same step written in plain torch (`hand_ms`)
numbers    the gradient of ECT by stage in TF32, bf16 and fp16: its cosine with the one in float32
parts      forward and backward pass of EDM's CIFAR-10 network by precision, and keyed dropout
tangent    the exact derivative of a network, eager and compiled, beside the forward pass
optimizer  the optimisers and the average of the weights
draws      random numbers of a step, beside torch.randn, and how many differ from those of the CPU
sampling   pipeline calls beside network calls, and images of seeds per second
save       the time for which a checkpoint holds the training
large      ADM at 64 x 64 and DiT-XL/2: time and memory by batch

`mfu` is the share of `--peak`, by default the dense rates of an H100. Nothing here has been run on a GPU yet.
"""

# ruff: noqa: B023 (each function is called in its own turn of the loop)

import argparse
import gc
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common import CUDA, DEVICE, host_milliseconds, milliseconds, peak_gib, precision, synchronize
from diffusers import DiTTransformer2DModel
from hand_written import HandWritten
from step_cost import METHODS, build_trainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from waits import mark_host, waits

from cm_diffusers import ConsistencyPipeline, MultistepConsistencyScheduler
from cm_diffusers.core.draws import Draws
from cm_diffusers.core.ema import EMA, ConstantDecay
from cm_diffusers.core.tangents import jvp, jvp_ready
from cm_diffusers.engine.config import RunArguments
from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.optimisers import build_optimizer
from cm_diffusers.engine.training.precision import arithmetic, choose_precision
from cm_diffusers.engine.training.trainer import Trainer
from cm_diffusers.models import DiTModel, build_unet
from cm_diffusers.objectives import ECT, OBJECTIVES, Batch, ModelSpec
from cm_diffusers.sampling import sample_images


PEAK = {"no": 67e12, "tf32": 495e12, "bf16": 989e12, "fp16": 989e12}  # FLOP/s of an H100
PASSES = {"diffusion": 3, "ect": 4, "sct": 6}  # in forward passes: a backward pass is two more, a tangent two
DIT = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "sample_size": 32}
TINY_DIT = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
TINY_PRESETS = {"ddpmpp_32": "ddpmpp_tiny", "adm_64": "ddpmpp_tiny", "cifar10": "tiny", "jvp_cifar10": "jvp_tiny"}
COUNTED = 4  # steps whose waits are counted
COMPILE_SECONDS = 60  # left in the budget for a case that compiles a network


class Bench:
    """The rows so far, the size of the measurements, and the time that is left."""

    def __init__(self, out: Path, budget: float, tiny: bool, peak: dict[str, float]):
        self.out, self.tiny, self.peak, self.rows = out, tiny, peak, []
        self.section, self.end = "machine", time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    @property
    def compiles(self) -> bool:
        """Whether there is a compiler, and time for it."""
        return CUDA and not self.tiny and self.left > COMPILE_SECONDS

    def say(self, name: str, **facts: Any) -> None:
        """Add a row to the file."""
        self.rows.append({"section": self.section, "name": name, **facts})
        self.out.write_text(json.dumps(self.rows, indent=1))
        print(json.dumps(self.rows[-1]), flush=True)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A measurement: its failure is a row, and nothing of it stays on the GPU."""
        try:
            yield
        except Exception as error:  # whatever it is, the other measurements are still worth their time
            self.say(name, error=f"{type(error).__name__}: {error}"[:500])
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()

    def size(self, whole: int, tiny: int) -> int:
        """`whole`, or `tiny` with --tiny."""
        return tiny if self.tiny else whole

    def preset(self, name: str) -> str:
        """The preset `name`, or a small one of its kind with --tiny."""
        return TINY_PRESETS[name] if self.tiny else name

    def network(self, preset: str, side: int, dropout: float = 0.0, classes: int | None = None) -> nn.Module:
        """A new network on the device. Its last layer, which starts at 0, is set to small numbers."""
        torch.manual_seed(0)
        network = build_unet(self.preset(preset), (side, side), 3, classes, dropout)
        for name, weight in network.named_parameters():
            if name.endswith("conv_out.weight"):
                nn.init.normal_(weight, std=0.02)
        return network.to(DEVICE)

    def dit(self) -> nn.Module:
        """DiT-XL/2 for latents of 32 x 32, or a small one."""
        shape = {"in_channels": 4, "out_channels": 4, "num_embeds_ada_norm": 1000, **(TINY_DIT if self.tiny else DIT)}
        return DiTModel.from_transformer(DiTTransformer2DModel(**shape)).to(DEVICE)


def forward_flops(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Of one sample; a multiplication and an addition are two."""
    classes = {"class_labels": torch.zeros(1, dtype=torch.long, device=DEVICE)}
    conditional = getattr(network.config, "num_class_embeds", None)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(
            torch.randn(1, *shape, device=DEVICE), torch.ones(1, device=DEVICE), **(classes if conditional else {})
        )
    return counter.get_total_flops()


def forward_backward(network: Callable, sample: Tensor, label: Tensor, kind: str) -> Callable[[], None]:
    """A function that takes a forward and a backward pass in a precision."""

    def run() -> None:
        with precision(kind):
            loss = network(sample, label).sample.float().square().mean()
        loss.backward()

    return run


@contextmanager
def steps_of(bench: Bench, method: str, batch: int, preset: str, kind: str, flags: tuple = ()) -> Iterator[tuple]:
    """A trainer as the training scripts make it, after one step, and a function that takes further steps."""
    AcceleratorState._reset_state(True)
    side = bench.size(32, 16)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator(mixed_precision="no" if kind == "tf32" else kind)
        preset, shape = bench.preset(preset), (side, side, 3)
        trainer: Trainer = build_trainer(method, folder, accelerator, batch, shape, preset, flags)
        batches, stopping = trainer.data.batches(trainer.share, 0), Stopping()

        def step() -> None:
            trainer.take_step(batches, stopping)

        mark_host([trainer.data.images, trainer.data.labels])
        waits(step)
        yield trainer, step
        batches.close()


def measure_waits(bench: Bench) -> None:
    """Waits and host time of a step of each method."""
    for method, cls in OBJECTIVES.items():
        with bench.case(method):
            kind, preset = choose_precision(cls, None)[0], "jvp_cifar10" if METHODS[method].tangent else "cifar10"
            with steps_of(bench, method, bench.size(64, 4), preset, kind) as (_, step):
                found = waits(lambda: [step() for _ in range(COUNTED)])
                places = {place: round(number / COUNTED, 2) for place, number in found.most_common(20)}
                facts = {"precision": kind, "waits_per_step": round(sum(found.values()) / COUNTED, 2)}
                bench.say(method, **facts, host_ms=host_milliseconds(step, bench.size(5, 2)), places=places)


def measure_steps(bench: Bench) -> None:
    """Whole steps of the real loop, beside the same in plain torch."""
    cases = [("ect", "fp16", False), ("ect", "fp16", True), ("ect", "tf32", False), ("diffusion", "bf16", True)]
    cases += [("sct", "bf16", False), ("sct", "bf16", True)]
    batch, repeats = bench.size(128, 2), bench.size(8, 2)
    for method, kind, compiled in cases:
        kind = kind if CUDA or kind != "fp16" else "bf16"
        name = f"{method}, batch {batch}, {kind}{', compiled' if compiled else ''}"
        if (compiled and not bench.compiles) or bench.left < 0:
            continue
        preset = "jvp_cifar10" if method == "sct" else "ddpmpp_32"
        flags = ("--optimizer", "adam", *(("--compile",) if compiled else ()))
        with bench.case(name):
            with steps_of(bench, method, batch, preset, kind, flags) as (trainer, step):
                facts: dict[str, Any] = {"ms": milliseconds(step, repeats), "peak_gib": peak_gib(step)}
                facts |= {"host_ms": host_milliseconds(step, 3), "waits_per_step": sum(waits(step).values())}
                side = trainer.data.resolution[0]
                flops = PASSES[method] * batch * forward_flops(trainer.objective.network, (3, side, side))
            facts["images_per_s"] = round(1000 * batch / facts["ms"], 1)
            facts["mfu"] = round(flops / (facts["ms"] / 1000) / bench.peak[kind], 4)
            if method != "sct":
                torch._dynamo.reset()
                network = bench.network("ddpmpp_32", side, classes=10)
                hand = HandWritten(network, side, method, batch, kind, compiled)
                facts["hand_ms"] = milliseconds(hand, repeats)
                facts |= {"hand_peak_gib": peak_gib(hand), "ratio": round(facts["ms"] / facts["hand_ms"], 3)}
            bench.say(name, **facts)
        torch._dynamo.reset()


def measure_numbers(bench: Bench) -> None:
    """ECT's gradient in other precisions, on a network that has learned for a while."""
    side, batch = bench.size(32, 8), bench.size(128, 4)
    with bench.case("gradient of ECT"):
        network, spec = bench.network("ddpmpp_32", side), ModelSpec(0.5)
        coarse = torch.randn(256, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        images = (F.interpolate(coarse, side, mode="bicubic") / 3).clamp(-1, 1).to(DEVICE)
        pretraining = ECT(network, spec, ECT.Options(pretrain_steps=10**6), 10**6)
        optimizer, step = torch.optim.Adam(network.parameters(), 5e-4, fused=True), 0
        end = time.monotonic() + min(20.0, bench.left / 4) if not bench.tiny else 0.0
        while step < 4 or time.monotonic() < end:
            rows = torch.arange(step * batch, (step + 1) * batch, device=DEVICE) % len(images)
            with precision("bf16"):
                loss = pretraining.loss(Batch(images[rows]), Draws(0, step, range(batch), DEVICE)).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        tuning = ECT(network, spec, ECT.Options(pretrain_steps=0, stage_steps=1), 100, True)

        def gradient(kind: str, stage: int) -> Tensor:
            scale = 1024.0 if kind == "fp16" else 1.0
            with precision(kind):
                loss = tuning.loss(Batch(images[:batch]), Draws(0, stage, range(batch), DEVICE)).total
            weights = [weight for weight in network.parameters() if weight.requires_grad]
            found = torch.autograd.grad(loss * scale, weights, allow_unused=True)
            return torch.cat([part.flatten().double() / scale for part in found if part is not None])

        for stage in (0, 3, 5, 7):
            exact, others = gradient("no", stage), ("tf32", "bf16", "fp16") if CUDA else ("bf16",)
            cosines = {kind: F.cosine_similarity(exact, gradient(kind, stage), 0).item() for kind in others}
            bench.say(f"gradient of ECT, stage {stage}", pretraining_steps=step, cosine_with_float32=cosines)


def measure_parts(bench: Bench) -> None:
    """Forward and backward passes of EDM's network for CIFAR-10."""
    side, batch, repeats = bench.size(32, 16), bench.size(128, 2), bench.size(8, 2)
    sample, label = torch.randn(batch, 3, side, side, device=DEVICE), torch.ones(batch, device=DEVICE)
    network = bench.network("ddpmpp_32", side)
    flops = forward_flops(network, (3, side, side))
    cases = [("no", False), ("tf32", False), ("bf16", False), ("fp16", False), ("fp16", True)]
    for kind, compiled in cases if CUDA else cases[:3]:
        name = f"forward and backward, batch {batch}, {kind}{', compiled' if compiled else ''}"
        if compiled and not bench.compiles:
            continue
        with bench.case(name):
            run = forward_backward(torch.compile(network) if compiled else network, sample, label, kind)
            ms = milliseconds(run, repeats)
            mfu = round(3 * batch * flops / (ms / 1000) / bench.peak[kind], 4)
            bench.say(name, ms=ms, mfu=mfu, peak_gib=peak_gib(run), forward_gflop=round(flops / 1e9, 3))
            network.zero_grad()
    torch._dynamo.reset()
    with bench.case("keyed dropout"), torch.no_grad(), precision("bf16"):
        network = bench.network("ddpmpp_32", side, dropout=0.2).train()
        facts = {"plain_ms": milliseconds(lambda: network(sample, label), repeats)}
        network.key_dropout(torch.arange(batch, device=DEVICE))
        facts["keyed_ms"] = milliseconds(lambda: network(sample, label), repeats)
        facts["keyed_peak_gib"] = peak_gib(lambda: network(sample, label))
        network.eval()
        facts["none_ms"] = milliseconds(lambda: network(sample, label), repeats)
        bench.say(f"forward with dropout, batch {batch}, bf16", **facts)


def measure_tangent(bench: Bench) -> None:
    """The exact derivative of networks along a direction of (sample, label)."""
    side, batch, repeats = bench.size(32, 8), bench.size(128, 2), bench.size(4, 1)
    cases = [("jvp_cifar10", bench.network("jvp_cifar10", side), batch, (3, side, side))]
    cases += [("DiT-XL/2", bench.dit(), bench.size(32, 2), (4, *2 * [bench.size(32, 8)]))]
    for name, network, rows, shape in cases:
        sample, label = torch.randn(rows, *shape, device=DEVICE), torch.rand(rows, device=DEVICE)
        primals, tangents = (sample, label), (torch.randn_like(sample), torch.ones_like(label))

        def call(sample: Tensor, label: Tensor, network: nn.Module = network) -> Tensor:
            return network(sample, label).sample

        def exact() -> tuple[Tensor, Tensor]:
            return jvp(call, primals, tangents, "exact")

        with bench.case(name), jvp_ready(network), precision("bf16"):
            with torch.no_grad():
                facts = {"forward_ms": milliseconds(lambda: call(*primals), repeats)}
            facts |= {"exact_ms": milliseconds(exact, repeats), "exact_peak_gib": peak_gib(exact)}
            if bench.compiles and name != "DiT-XL/2":
                compiled = torch.compile(lambda *given: torch.func.jvp(call, given[:2], given[2:]))
                with torch.no_grad():
                    difference = compiled(*primals, *tangents)[1].float() - exact()[1].float()
                    facts["compiled_ms"] = milliseconds(lambda: compiled(*primals, *tangents), repeats)
                facts["compiled_differs_by"] = (difference.norm() / exact()[1].float().norm()).item()
            bench.say(f"{name}, batch {rows}, bf16", **facts)
    torch._dynamo.reset()


def measure_optimizer(bench: Bench) -> None:
    """Steps of the optimisers that a run builds, and of the average of its weights."""
    with bench.case("optimizer"):
        network, facts = bench.network("ddpmpp_32", bench.size(32, 16)), {}
        for weight in network.parameters():
            weight.grad = torch.full_like(weight, 1e-3)
        for name in ("radam", "adam", "adamw"):
            optimizer = build_optimizer(network, RunArguments(optimizer=name))
            facts[f"{name}_ms"] = milliseconds(optimizer.step)
            facts[f"{name}_host_ms"] = host_milliseconds(optimizer.step)
            facts[f"{name}_peak_gib"] = peak_gib(optimizer.step)
        plain = torch.optim.Adam(network.parameters(), 1e-4, fused=True)
        average = EMA(network, [ConstantDecay(0.999)])
        facts |= {"plain_fused_adam_ms": milliseconds(plain.step)}
        facts |= {"ema_ms": milliseconds(lambda: average.update(1000, 10))}
        bench.say(f"{sum(weight.numel() for weight in network.parameters()) / 1e6:.1f} M weights", **facts)


def measure_draws(bench: Bench) -> None:
    """The numbers of a step."""
    for batch, shape in ((64, (3, 32, 32)), (512, (3, 32, 32)), (128, (3, 64, 64))):
        batch = bench.size(batch, 4)
        with bench.case(f"{batch} x {shape}"):
            facts = {"normal_ms": milliseconds(lambda: Draws(0, 5, range(batch), DEVICE).normal("noise", shape), 4)}
            facts["number_a_row_ms"] = milliseconds(lambda: Draws(0, 5, range(batch), DEVICE).normal("sigma"), 4)
            facts["randn_ms"] = milliseconds(lambda: torch.randn(batch, *shape, device=DEVICE), 4)
            ours, cpu = (Draws(0, 5, range(batch), device).normal("noise", shape).cpu() for device in (DEVICE, "cpu"))
            facts |= {"numbers": ours.numel(), "unlike_the_cpu": (ours != cpu).sum().item()}
            bench.say(f"{batch} x {shape}", **facts)


@torch.no_grad()
def measure_sampling(bench: Bench) -> None:
    """Calls of a pipeline, beside calls of its network."""
    side, many = bench.size(32, 16), bench.size(64, 2)
    for dtype in (torch.float32, torch.bfloat16):
        with bench.case(str(dtype)):
            network = bench.network("ddpmpp_32", side).to(dtype).eval()
            pipeline = ConsistencyPipeline(network, MultistepConsistencyScheduler(sigma_min=0.0))
            pipeline.set_progress_bar_config(disable=True)
            for batch in (1, many):
                latents, label = torch.randn(batch, 3, side, side, device=DEVICE), torch.ones((), device=DEVICE)
                facts, inputs = {}, latents.to(dtype)
                for steps in (1, 2):
                    given = {"latents": latents, "num_inference_steps": steps, "output_type": "pt"}
                    facts[f"call_of_{steps}_ms"] = milliseconds(lambda given=given: pipeline(**given), 4)
                facts["network_ms"] = milliseconds(lambda: network(inputs, label), 4)
                bench.say(f"{dtype}, batch {batch}", **facts)
            count, start = bench.size(1000, 4), time.perf_counter()
            sample_images(pipeline, range(count), batch_size=min(count, 250), num_inference_steps=1)
            bench.say(f"{dtype}, images of seeds", images_per_s=round(count / (time.perf_counter() - start), 1))


def measure_save(bench: Bench) -> None:
    """Checkpoints in training: how long they hold it, and how long the next steps take."""
    with bench.case("checkpoint"), steps_of(bench, "ect", bench.size(64, 2), "ddpmpp_32", "no") as (trainer, step):
        facts = {"step_ms": milliseconds(step, 2)}
        tensors = [tensor for group in trainer.state.tensors().values() for tensor in group.values()]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        synchronize()
        start = time.perf_counter()
        trainer.save()
        facts |= {"held_s": round(time.perf_counter() - start, 3), "step_after_ms": milliseconds(step, 2, 0)}
        bench.say("checkpoint", gb=round(size / 1e9, 3), **facts)


def measure_large(bench: Bench) -> None:
    """Forward and backward passes of large networks, by batch."""
    side = bench.size(64, 16)
    for name in ("adm_64", "DiT-XL/2"):
        for batch in (2,) if bench.tiny else (16, 64, 128):
            if bench.left < 10:
                return
            with bench.case(f"{name}, batch {batch}, bf16"):
                if name == "adm_64":
                    network, shape = bench.network(name, side), (3, side, side)
                else:
                    network, shape = bench.dit(), (4, *2 * [bench.size(32, 8)])
                sample, label = torch.randn(batch, *shape, device=DEVICE), torch.ones(batch, device=DEVICE)
                run = forward_backward(network.train(), sample, label, "bf16")
                ms, flops = milliseconds(run, 3, 1), 3 * batch * forward_flops(network, shape)
                facts = {"mfu": round(flops / (ms / 1000) / bench.peak["bf16"], 4), "peak_gib": peak_gib(run)}
                bench.say(f"{name}, batch {batch}, bf16", ms=ms, images_per_s=round(1000 * batch / ms, 1), **facts)


SECTIONS = {
    "waits": measure_waits,
    "steps": measure_steps,
    "numbers": measure_numbers,
    "parts": measure_parts,
    "tangent": measure_tangent,
    "optimizer": measure_optimizer,
    "draws": measure_draws,
    "sampling": measure_sampling,
    "save": measure_save,
    "large": measure_large,
}


def main() -> None:
    """Run the sections in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew with each measurement")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds (default: 600)")
    parser.add_argument("--tiny", action="store_true", help="small networks and images, for a CPU")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--peak", type=json.loads, default=PEAK, help="FLOP/s by precision, as JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    bench = Bench(args.out, args.budget, args.tiny, args.peak)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    bench.say("machine", device=device, python=platform.python_version(), torch=torch.__version__, tiny=args.tiny)
    for name in args.sections:
        bench.section = name
        if bench.left <= 0:
            bench.say(name, skipped="the budget is spent")
            continue
        start = time.monotonic()
        with bench.case(name), arithmetic(RunArguments()):
            SECTIONS[name](bench)
        bench.say("end", seconds=round(time.monotonic() - start, 1))


if __name__ == "__main__":
    main()

"""Memory of a training run: copies of the weights by role, and the peak relative to that of a diffusion step.

    python benchmarks/memory.py

- Copies: bytes of distinct storages after three steps of the real training loop, divided by the bytes of the network's
  weights. `other` counts all further tensors of the process except the batch and data.
- Peak: memory above that before the network was built, in a fresh process.

Setting: batch 256, images of 28x28, float32, preset `small`. Methods with tangents, and the diffusion (`trigflow`)
that they are compared with, use `jvp_small`.
"""

import argparse
import gc
import multiprocessing
import resource
import tempfile

import psutil
import torch
from accelerate import Accelerator
from common import show
from step_cost import METHODS, build_trainer

from cm_diffusers.engine.stopping import Stopping
from cm_diffusers.engine.training.trainer import Trainer


BATCH = 256


def copies(trainer: Trainer, gradients: list[torch.Tensor]) -> dict[str, float]:
    """Bytes of each role divided by those of the network's weights; a storage counts for its first role only."""
    objective = trainer.objective
    roles = {
        "network": list(objective.network.state_dict().values()),
        "gradients": gradients,
        "optimizer": [value for state in trainer.state.optimizer.state.values() for value in state.values()],
        "ema": [value for shadow in trainer.state.ema.shadows.values() for value in shadow.values()],
        "target": [value for module in objective.auxiliary.values() for value in module.state_dict().values()],
        "teacher": list(objective.teacher.network.state_dict().values()) if objective.teacher else [],
    }
    data = {trainer.data.images.untyped_storage().data_ptr()}
    roles["other"] = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    seen, sizes = data, {}
    for role, tensors in roles.items():
        new = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        sizes[role] = sum(size for pointer, size in new.items() if pointer not in seen)
        seen |= set(new)
    return {role: round(size / sizes["network"], 2) for role, size in sizes.items()}


def measure(name: str) -> dict:
    """Copies of the weights by role, and the peak memory of three steps in MiB."""
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        accelerator = Accelerator()
        idle = torch.cuda.memory_allocated() if cuda else psutil.Process().memory_info().rss
        trainer = build_trainer(name, folder, accelerator, BATCH)
        gradients: list[torch.Tensor] = []
        trainer.state.optimizer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: gradients.extend(p.grad for group in optimizer.param_groups for p in group["params"])
        )
        batches = trainer.data.batches(trainer.share, 0)
        for _ in range(3):
            gradients.clear()
            trainer.take_step(batches, Stopping())
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"copies": copies(trainer, gradients), "peak_mib": round((peak - idle) / 2**20)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="default: all")
    args = parser.parse_args()
    names = ["diffusion", "trigflow", *(name for name in args.methods if name not in ("diffusion", "trigflow"))]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # one process per method
        rows = dict(zip(names, pool.map(measure, names, chunksize=1)))
    for name, row in rows.items():
        diffusion = rows["trigflow" if METHODS[name].tangent or name == "trigflow" else "diffusion"]
        row["peak_over_diffusion"] = round(row["peak_mib"] / diffusion["peak_mib"], 3)
    show(rows)

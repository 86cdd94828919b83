"""The repository's scripts, as commands and as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock


ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "training" / "train_consistency.py")
PYTHON = [sys.executable, SCRIPT]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", SCRIPT]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]


def load_script(name: str, folder: str = "training") -> ModuleType:
    """Import a script afresh and return its module. `sys.path` has the script's folder during the import only."""
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(ROOT / folder), *sys.path]):
        spec.loader.exec_module(module)
    return module

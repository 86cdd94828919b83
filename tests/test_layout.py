"""The imports that each part may have, and code that is forbidden everywhere."""

import ast
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

from cm_diffusers.objectives import OBJECTIVES


ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "cm_diffusers"
ENGINE = LIBRARY / "engine"
STDLIB = set(sys.stdlib_module_names)

# for each part: other parts and packages that it may import, besides the standard library
PARTS = {
    "core": ((), {"torch", "numpy"}),
    "registration": ((), set()),
    "models": (("core", "registration"), {"torch", "numpy", "diffusers"}),
    "schedulers": (("core", "registration"), {"torch", "numpy", "diffusers"}),
    "pipelines": (("core",), {"torch", "numpy", "diffusers", "PIL"}),  # diffusers needs PIL
    "lookup": ((), {"huggingface_hub"}),
    "parent": ((), set()),
    "sampling": (("lookup", "pipelines"), {"torch", "numpy", "diffusers", "PIL"}),
    "pixels": ((), {"numpy", "PIL"}),
    "demo": (("core", "pipelines", "sampling", "pixels"), {"torch", "numpy", "diffusers", "PIL", "gradio"}),
    "convert": (("models", "schedulers", "pipelines"), {"torch", "diffusers", "safetensors"}),
    "evaluation": (("core", "convert", "lookup"), {"torch", "safetensors", "transformers"}),
    "objectives": (("core", "models", "schedulers", "pipelines"), {"torch", "diffusers", "lpips"}),  # lpips: an extra
}
# the engine's rooms, each with the other rooms that it may use
ROOMS = {
    "ground": (),
    "data": (),
    "pictures": (),
    "saved": ("data",),
    "sharing": ("data",),
    "text": ("data", "pictures", "saved", "sharing"),
    "deploy": ("sharing",),
    "training": ("data", "pictures", "saved", "sharing", "text"),
    "evaluation": ("data", "pictures", "saved", "sharing", "training"),
}


def sources(folder):
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    assert files
    return files


def folder_of(part):
    return ROOT / "pipelines" if part == "pipelines" else LIBRARY / part


def imports(path):
    """Full names of a file's imported modules; `from cm_diffusers import x` gives cm_diffusers and cm_diffusers.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            if node.module == "cm_diffusers":
                yield from (f"cm_diffusers.{alias.name}" for alias in node.names)


PART_FILES = [(part, path) for part in PARTS for path in sources(folder_of(part))]
ALL_FILES = [path for folder in (LIBRARY, ROOT / "pipelines", ROOT / "training") for path in sources(folder)]


def name_of(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


@pytest.mark.parametrize("part, path", PART_FILES, ids=name_of)
def test_a_part_imports_only_what_it_may(part, path):
    parts, packages = PARTS[part]
    for name in imports(path):
        if name.startswith("."):
            assert part in ("models", "pipelines", "schedulers"), f"{name}: relative"
            name = resolve_name(name, f"cm_diffusers.{part}")
        root = name.split(".")[0]
        if root == "cm_diffusers":
            imported = name.split(".")[1] if "." in name else None
            assert imported in (part, *parts) or (imported is None and part != "core"), name
            assert imported is not None, f"{name}: name the part"
        else:
            assert root in packages | STDLIB, name


@pytest.mark.parametrize("path", [*sources(LIBRARY), *sources(ROOT / "pipelines")], ids=name_of)
def test_the_library_imports_neither_its_scripts_nor_its_tests(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"training", "tests", "benchmarks", "train_consistency", "train_diffusion"}


@pytest.mark.parametrize("path", [p for p in sources(LIBRARY) if ENGINE not in p.parents], ids=name_of)
def test_the_engine_is_imported_by_the_engine_alone(path):
    assert not any(name.startswith("cm_diffusers.engine") for name in imports(path))


@pytest.mark.parametrize("path", sources(ENGINE), ids=name_of)
def test_arrows_between_the_rooms_of_the_engine_lead_one_way(path):
    """Files outside all rooms are the ground, which every room may use and which uses no room."""
    room = path.relative_to(ENGINE).parts[0] if path.parent != ENGINE else "ground"
    for name in imports(path):
        parts = name.split(".")
        if parts[:2] == ["cm_diffusers", "engine"] and len(parts) > 2:
            assert (parts[2] if parts[2] in ROOMS else "ground") in (room, "ground", *ROOMS[room]), name


def test_every_room_of_the_engine_is_known():
    assert {path.name for path in ENGINE.iterdir() if path.is_dir() and path.name[0] != "_"} == ROOMS.keys() - {
        "ground"
    }


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_nothing_is_pickled(path):
    """Only convert/reading.py reads foreign pickles, by a reader that refuses names and by torch's safe reader."""
    tree = ast.parse(path.read_text())
    forbidden = {("torch", "save"), ("torch", "load"), ("pickle", "load"), ("pickle", "loads")}
    modules = {"pickle", "cPickle", "cloudpickle", "dill", "joblib"}
    if path == LIBRARY / "convert" / "reading.py":
        modules.remove("pickle")
        forbidden.remove(("torch", "load"))
        loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
        assert loads and all("weights_only=True" in map(ast.unparse, call.keywords) for call in loads)
    assert not {name.split(".")[0] for name in imports(path)} & modules
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("register_for_checkpointing", "save_state", "load_state"), ast.unparse(node)
            assert not (isinstance(node.value, ast.Name) and (node.value.id, node.attr) in forbidden), ast.unparse(
                node
            )
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not {alias.name for alias in node.names} & {"save", "load"}


@pytest.mark.parametrize("path", sources(LIBRARY / "objectives"), ids=name_of)
def test_a_method_is_one_file_that_names_its_paper(path):
    if path.stem in OBJECTIVES:
        assert re.search(r"arXiv:\d{4}\.\d{5}", path.read_text())


@pytest.mark.parametrize("path", sources(LIBRARY / "objectives"), ids=name_of)
def test_the_body_of_a_loss_is_short(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "loss":
            body = node.body[ast.get_docstring(node) is not None :]
            assert not body or body[-1].end_lineno - body[0].lineno < 25


def test_the_checks_above_see_imports(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def f():\n    import pickle, a.b\n    from cm_diffusers import engine\n    from . import x\n")
    assert set(imports(path)) == {"pickle", "a.b", "cm_diffusers", "cm_diffusers.engine", "."}


def test_importing_the_library_brings_in_nothing_that_only_training_needs():
    code = (
        "import sys, diffusers\n"
        "from diffusers import DiffusionPipeline, UNet2DModel, EDMEulerScheduler, CMStochasticIterativeScheduler\n"
        "from diffusers import ConsistencyModelPipeline\n"
        "before = set(sys.modules)\n"
        "import cm_diffusers, cm_diffusers.objectives, cm_diffusers.models\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    new, loaded = (set(line.split()) for line in run.stdout.splitlines())
    assert "cm_diffusers" in new
    assert not new & {"accelerate", "transformers", "yaml", "tqdm", "filelock"}
    assert not loaded & {"datasets", "matplotlib", "sklearn", "tensorboard", "wandb"}

"""The requirements in setup.py: they cover all imports, with tested lower bounds."""

import ast
import importlib
import pkgutil
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import cm_diffusers


ROOT = Path(__file__).parents[1]
CALLED = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # packages with another import name
TRIED = ("demo",)  # extras in the environment with the lowest versions
TOOLS = {"pytest", "pytest-timeout", "pytest-xdist"}  # they run the tests there


@pytest.fixture
def setup(monkeypatch):
    """The arguments that setup.py passes to setuptools."""
    given = {}
    monkeypatch.setitem(
        sys.modules, "setuptools", SimpleNamespace(setup=given.update, find_packages=lambda include: [])
    )
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


def bounds(requirements):
    """Versions of requirements by name, without trailing zeros."""
    pairs = [re.fullmatch(r"([\w-]+)(?:>=|==)([\d.]+)", line).groups() for line in requirements]
    return {name: re.sub(r"(\.0)+$", "", version) for name, version in pairs}


def imported(*folders):
    """The distributions that the files of the named folders import."""
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py") if (ROOT / folder).is_dir() else [ROOT / folder]:
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                for package in {name.split(".")[0] for name in names} - {"cm_diffusers"}:
                    if package not in sys.stdlib_module_names and not (ROOT / "training" / f"{package}.py").exists():
                        yield CALLED.get(package, package.replace("_", "-"))


def test_everything_imported_is_required(setup):
    extras = setup["extras_require"]
    required = bounds(setup["install_requires"]).keys() | {name for extra in extras.values() for name in bounds(extra)}
    assert set(imported("cm_diffusers", "pipelines", "training")) <= required


def test_a_space_gets_what_sampling_needs(setup):
    asked = (ROOT / "hub_cards/space/requirements.txt").read_text().split()
    assert set(asked) <= set(setup["install_requires"])
    files = ("core", "models", "schedulers", "sampling.py", "pixels.py", "lookup.py", "demo.py")
    used = set(imported(*(f"cm_diffusers/{name}" for name in files), "pipelines"))
    assert used - {"gradio"} <= bounds(asked).keys()  # Spaces provide gradio


def test_a_model_can_be_used_with_the_base_alone(setup):
    files = ("core", "models", "objectives", "schedulers", "convert", "sampling.py", "pixels.py", "lookup.py")
    used = set(imported(*(f"cm_diffusers/{name}" for name in files), "pipelines"))
    assert used - {"lpips"} <= bounds(setup["install_requires"]).keys()


def test_an_installed_package_can_train_and_export(setup):
    used = set(imported("cm_diffusers/engine", "cm_diffusers/evaluation", "training"))
    assert used - {"peft", "bitsandbytes"} <= bounds(setup["install_requires"]).keys()  # the extras lora and nf4


def test_the_lower_bounds_are_those_that_are_tried(setup):
    lines = (ROOT / "constraints-floors.txt").read_text().splitlines()
    tried = bounds(line for line in lines if not line.startswith("#"))
    stated = bounds(setup["install_requires"])
    for extra in TRIED:
        stated |= bounds(setup["extras_require"][extra])
    tools = {name: version for name, version in bounds(setup["extras_require"]["test"]).items() if name in TOOLS}
    assert tried == stated | tools


def test_the_versions_of_the_tests_are_as_high_as_the_lower_bounds(setup):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    newest = bounds(line for line in lines if not line.startswith("#"))
    for name, version in bounds(setup["install_requires"] + setup["extras_require"]["dev"]).items():
        assert [*map(int, newest[name].split("."))] >= [*map(int, version.split("."))], name


def test_the_version_is_that_of_the_package(setup):
    assert setup["version"] == cm_diffusers.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cm_diffusers.__version__
    assert f"## [{cm_diffusers.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_tools_are_pinned_alike(setup):
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = set((ROOT / "constraints.txt").read_text().splitlines())
    (ruff,) = (tool for tool in setup["extras_require"]["dev"] if tool.startswith("ruff=="))
    assert ruff in pinned and hooks.count(f"[{ruff}]") == 2


def test_every_module_can_be_imported():
    found = [module.name for module in pkgutil.walk_packages(cm_diffusers.__path__, "cm_diffusers.")]
    assert len(found) > 100
    for name in found:
        importlib.import_module(name)

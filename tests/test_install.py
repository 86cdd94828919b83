"""The package from a wheel, in the source tree, and (where these tests run) from an editable install."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import cm_diffusers
from cm_diffusers.engine.sharing.space import write_space


ROOT = Path(__file__).resolve().parent.parent
SHOW = (
    "import cm_diffusers, cm_diffusers.pipelines.consistency as c; print(cm_diffusers.__file__, c.__file__, sep='\\n')"
)


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory):
    """A folder with an installed wheel, built from a copy of the source, because builds leave files and reuse them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("cm_diffusers", "hub_cards", "pipelines", "training"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / "tree")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = folder / "built"
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", built, folder / "tree"], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", *built.glob("*.whl")], check=True)
    return folder / "site"


def imported_from(path, cwd):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    result = subprocess.run([sys.executable, "-c", SHOW], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [Path(line) for line in result.stdout.split()]


def test_a_wheel_holds_every_module_and_what_they_read_and_nothing_else(wheel_folder):
    def files(folder, pattern="*"):
        paths = (path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder.parent).as_posix() for path in paths}

    modules = files(ROOT / "cm_diffusers", "*.py") | {f"cm_diffusers/{name}" for name in files(ROOT / "pipelines")}
    modules |= {f"cm_diffusers/{name.replace('training/', 'scripts/')}" for name in files(ROOT / "training")}
    folders = [files(ROOT / "hub_cards" / name) for name in ("space", "page")]
    alone = ("model_card.md", "text_card.md", "report.html")
    templates = {f"cm_diffusers/hub_cards/{name}" for name in (*alone, *set().union(*folders))}
    assert files(wheel_folder / "cm_diffusers") == modules | templates | {"cm_diffusers/py.typed"}
    info = f"cm_diffusers-{cm_diffusers.__version__}.dist-info"
    assert {path.name for path in wheel_folder.iterdir()} == {"cm_diffusers", info, "bin"}
    assert [path.name for path in (wheel_folder / "bin").iterdir()] == ["cm-diffusers"]


def test_a_wheel_holds_the_package_and_its_pipelines(wheel_folder, tmp_path):
    package, pipeline = imported_from(wheel_folder, tmp_path)
    assert package == wheel_folder / "cm_diffusers" / "__init__.py"
    assert pipeline == wheel_folder / "cm_diffusers" / "pipelines" / "consistency.py"


@pytest.mark.wide
def test_a_source_distribution_holds_what_git_holds(tmp_path):
    """Files that only this repository needs are excepted."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    tree = tmp_path / "tree"
    for name in listed.stdout.split("\n"):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in listed.stdout.split("\n") if (ROOT / name).is_file()} - held
    assert all(name.startswith(".") for name in missing)
    assert "tests/test_install.py" in held and "training/configs/digits_ect.yaml" in held


def test_a_wheel_trains(wheel_folder, tmp_path):
    """The engine finds the files that it reads at import, such as the template of model cards."""
    show = (
        "import cm_diffusers.engine.training.run, cm_diffusers.engine.sharing.card as c; print(c.TEMPLATE.read_text())"
    )
    environment = {**os.environ, "PYTHONPATH": str(wheel_folder)}
    result = subprocess.run(
        [sys.executable, "-c", show], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (ROOT / "hub_cards" / "model_card.md").read_text().strip()
    assert (wheel_folder / "cm_diffusers" / "hub_cards" / "report.html").is_file()


def test_the_tree_works_as_it_is(tmp_path):
    package, pipeline = imported_from(ROOT, tmp_path)
    assert package == ROOT / "cm_diffusers" / "__init__.py"
    assert pipeline == ROOT / "pipelines" / "consistency.py"


def test_pipelines_have_one_home_in_the_tree():
    import cm_diffusers.pipelines

    assert [Path(p) for p in cm_diffusers.pipelines.__path__] == [ROOT / "pipelines"]


def test_a_wheel_holds_what_a_space_consists_of(wheel_folder, tmp_path):
    code = (
        "from pathlib import Path; from cm_diffusers.engine.sharing.space import write_space;"
        " write_space(Path('wheel'), 'a/b', Path())"
    )
    for name in ("tree", "wheel"):
        (tmp_path / name).mkdir()
    write_space(tmp_path / "tree", "a/b", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(wheel_folder)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    tree, wheel = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*.*")} for f in (tmp_path / "tree", tmp_path / "wheel")
    )
    assert tree == wheel and Path("pipelines/ctm.py") in wheel

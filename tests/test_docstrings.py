"""Docstrings of public names describe arguments, shapes and errors."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest

from cm_diffusers.engine.config import DataArguments, ModelArguments, RunArguments
from cm_diffusers.engine.evaluation.arguments import EvaluationArguments
from cm_diffusers.objectives import OBJECTIVES


PACKAGES = ["core", "objectives", "schedulers", "models", "convert", "evaluation", "toys", "pipelines", "sampling"]
SHAPE = re.compile(
    r"\((B|C|H|N|M|K|D|T|n|m|k|steps|features|classes|\.\.\.|\d+)(,[^()]*)?\)|any shape|same shape|scalar"
)
TENSOR = re.compile(r"\b(Tensor|ndarray|Values)\b")
OBVIOUS = {"self", "cls", "args", "kwargs"}


def modules():
    for name in PACKAGES:
        module = importlib.import_module(f"cm_diffusers.{name}")
        yield module
        for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
            yield importlib.import_module(f"{module.__name__}.{info.name}")


def written_in(module, value):
    """Whether the module's file holds it; `__module__` of public classes is the package."""
    try:
        return inspect.getsourcefile(value) == module.__file__
    except TypeError:  # not a function or class
        return False


def functions_of(module):
    """(name, function, docstring of its class or "") of all public functions and methods that the module defines."""
    for name, value in vars(module).items():
        if name.startswith("_") or not written_in(module, value):
            continue
        if inspect.isfunction(value):
            yield name, value, inspect.getdoc(value) or ""
        elif inspect.isclass(value):
            about = value.__doc__ or ""
            for method, member in vars(value).items():
                function = getattr(member, "__func__", getattr(member, "fget", member))
                if not inspect.isfunction(function) or function.__code__.co_filename != module.__file__:
                    continue
                if "__init__" == method:
                    yield f"{name}()", function, about
                elif not method.startswith("_"):
                    yield f"{name}.{method}", function, (inspect.getdoc(getattr(value, method)) or "") + about


def described(parameter, text):
    """Whether a sentence names the parameter in backticks, or an entry of `Args:` begins with it or lists it."""
    return re.search(rf"`\**{parameter}`|^ *(\**\w+, )*\**{parameter}(, \**\w+)*:", text, re.MULTILINE)


def parts(name, function, text):
    """What is missing of one docstring."""
    source = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    parameters = [p for p in inspect.signature(function).parameters if p not in OBVIOUS and not p.startswith("_")]
    yield from (f"argument {p}" for p in parameters if not described(p, text))
    if TENSOR.search(ast.unparse(source.args) + ast.unparse(source.returns or ast.Constant(0))):
        if not SHAPE.search(text):
            yield "shapes"
    raised = {
        node.exc.func.id
        for node in ast.walk(source)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    if raised - {"NotImplementedError", "StopIteration"} and "Raises:" not in text:
        yield "raises"


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__.partition(".")[2])
def test_docstrings_describe_arguments_shapes_and_errors(module):
    found = {name: list(parts(name, function, text)) for name, function, text in functions_of(module)}
    assert not {name: missing for name, missing in found.items() if missing}


GROUPS = [DataArguments, ModelArguments, RunArguments, EvaluationArguments, *(m.Options for m in OBJECTIVES.values())]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_help_texts_are_whole_sentences(group):
    for field in dataclasses.fields(group):
        assert re.fullmatch(r"[A-Z0-9].*\.", field.metadata["help"], re.DOTALL), field.name


def test_help_pages_have_whole_sentences():
    """Of every option of every command, also those that are declared by argparse alone."""
    for page in (Path(__file__).parents[1] / "training/help").glob("*.txt"):
        texts = re.findall(r"^  (?:-|[a-zA-Z]\w* ).*(?:\n {10,}.*)*", page.read_text(encoding="utf-8"), re.MULTILINE)
        for text in texts:
            if text.lstrip().startswith("-h, "):
                continue
            words = " ".join(text.split())
            assert re.search(r"\.( \(default: [^()]*\))?$", words), f"{page.name}: {words}"

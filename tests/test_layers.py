"""The house rules, read from the source: which layer sees which, and what no file may hold."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import rlhf_jax
from tests.properties import Properties

ROOT = Path(rlhf_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}

LAYERS = (
    ("types", "errors", "files", "digests", "cache", "numerics", "masking", "memory", "hosts", "lockstep", "signals"),
    ("vocabulary", "logprobs", "kl", "advantages", "importance", "normalizer", "losses"),
    ("mesh", "models", "interop", "sharding", "transfer", "placement", "replicas", "sampling", "rewards", "data"),
    ("guard", "optim", "train_step", "checkpoint", "metrics"),
    ("algorithms", "evals", "report"),
    ("config", "provenance", "records", "run", "usage", "cli", "inference", "plan", "sweep", "bench"),
)
LAYER = {name: number for number, names in enumerate(LAYERS, start=1) for name in names}
LOSSES = tuple(f"losses.{path.stem}" for path in sorted((ROOT / "losses").glob("[a-z]*.py")))
LAYER_2 = ("logprobs", "kl", "advantages", "importance", "normalizer", *LOSSES)


def part(module: str) -> str:
    """The name in the table of the module that a file or an import stands for."""
    return module.removesuffix(".py").replace("/", ".").split(".")[0]


def imports(tree: ast.Module) -> set[str]:
    """Parts of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {part(name.removeprefix("rlhf_jax.")) for name in names if name.startswith("rlhf_jax.")}
    return found - {"__version__"}


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def named(node: ast.expr | None) -> set[str]:
    """The classes that an `except` clause names."""
    nodes = node.elts if isinstance(node, ast.Tuple) else [node]
    return {ast.unparse(n).split(".")[-1] if n is not None else "everything" for n in nodes}


def offenders(rule) -> list[str]:
    """Where `rule(node)` holds, as file:line."""
    return [f"{name}:{node.lineno}" for name, tree in TREES.items() for node in ast.walk(tree) if rule(node)]


def test_every_part_stands_in_the_table():
    assert {part(name) for name in TREES} - {"__init__", "__main__"} == set(LAYER)


@pytest.mark.parametrize("name", [name for name in TREES if part(name) in LAYER])
def test_imports_point_from_a_higher_layer_to_a_lower_one(name):
    above = {other for other in imports(TREES[name]) if LAYER[other] > LAYER[part(name)]}
    assert not above, f"{name} (layer {LAYER[part(name)]}) imports {above}"


def test_the_reader_of_imports_reads_every_form_of_them():
    source = """
import rlhf_jax.kl as a, jax
from rlhf_jax import losses, __version__
from rlhf_jax.models.heads import box
def f():
    from rlhf_jax.report import write
"""
    assert imports(ast.parse(source)) == {"kl", "losses", "models", "report"}


def test_only_sharding_names_partition_spec():
    assert [name for name in TREES if "PartitionSpec" in (ROOT / name).read_text()] == ["sharding.py"]


def test_files_stay_under_400_lines():
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name in TREES}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}


def test_functions_stay_under_60_lines():
    long = [
        f"{name}:{node.name} {node.end_lineno - node.lineno + 1}"
        for name, tree in TREES.items()
        for node in functions(tree)
        if node.end_lineno - node.lineno >= 59
    ]
    assert long == []


def test_bodies_of_losses_stay_under_15_statements():
    for path in (ROOT / "losses").glob("*.py"):
        for node in functions(ast.parse(path.read_text())):
            statements = [n for n in ast.walk(node) if isinstance(n, ast.stmt)]
            assert len(statements) - 2 < 15, node.name  # without its head and its docstring


def test_no_getattr_with_a_default():
    def rule(node):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        return is_call and node.func.id == "getattr" and len(node.args) > 2

    assert offenders(rule) == []


def test_no_broad_except():
    broad = {"everything", "Exception", "BaseException"}
    assert offenders(lambda node: isinstance(node, ast.ExceptHandler) and named(node.type) & broad) == []


def test_no_keywords_are_swallowed():
    data = {"named"}  # its keywords are what it works on: field=stage
    assert {node.name for tree in TREES.values() for node in functions(tree) if node.args.kwarg} == data


def test_no_postponed_annotations_where_jaxtyping_checks_them():
    for name, tree in TREES.items():
        postponed = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in ast.walk(tree))
        assert not (postponed and "jaxtyping" in (ROOT / name).read_text()), name


def test_nothing_is_left_to_do():
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    assert [name for name in TREES if any(word in (ROOT / name).read_text() for word in words)] == []


def public_functions(module: str) -> dict:
    found = importlib.import_module(f"rlhf_jax.{module}")
    return {
        name: value
        for name, value in vars(found).items()
        if inspect.isfunction(value) and value.__module__ == found.__name__ and not name.startswith("_")
    }


@pytest.mark.parametrize("module", LAYER_2)
def test_layer_2_is_annotated_documented_and_shown_by_example(module):
    for name, fn in public_functions(module).items():
        if name.startswith("require"):
            continue  # a check of arguments
        assert ">>>" in (fn.__doc__ or ""), name
        assert hasattr(fn, "__wrapped__"), f"{name} is not @typed"
        parameters = inspect.signature(fn).parameters.values()
        assert all(p.annotation is not p.empty for p in parameters), name


@pytest.mark.parametrize("module", LAYER_2)
def test_every_function_of_layer_2_has_its_properties_tested(module):
    tests = importlib.import_module(f"tests.{'.'.join((*module.split('.')[:-1], 'test_' + module.split('.')[-1]))}")
    suites = [value for value in vars(tests).values() if isinstance(value, type) and issubclass(value, Properties)]
    tested = {case.fn.__name__ for suite in suites for case in suite.cases}
    public = {name for name in public_functions(module) if not name.startswith("require")}
    assert public - tested == set()

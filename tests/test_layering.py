"""Imports point one way, and each library has its place. Read from the source, so nothing need be installed."""

import ast
from pathlib import Path

import pytest

from tests.process import ROOT

# Each module may import from the rows below its own, never from its own row or above.
LAYERS = [
    {"__main__"},
    {"main", "front"},
    {"engine"},
    {"service", "server", "opening", "remote"},
    {"oip", "protocol"},
    {"routes"},
    {"edge"},
    {"exchange", "link"},
    {"totals"},
    {"predictor", "gate"},
    {"model"},
    {"task", "session"},
    {"artifact", "batcher", "oip_codec", "gpu"},
    {"settings", "metrics", "logs", "ticket", "ending"},
    {"errors", "tensors", "rowqueue", "deadlines", "lag"},
    {"__init__"},
]
RANK = {name: rank for rank, names in enumerate(reversed(LAYERS)) for name in names}
MODULES = sorted((ROOT / "app").glob("*.py"))
WEB = {"fastapi", "starlette", "uvicorn", "uvloop", "httptools"}
TRAINING = {"torch", "transformers", "safetensors", "onnx", "tqdm"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere in it, inside functions too: modules, and names from packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def own(path: Path) -> set[Path]:
    """The project's own files that a file imports."""
    found = set()
    for name in imports(path):
        place = ROOT.joinpath(*name.split("."))
        if place.with_suffix(".py").is_file():
            found.add(place.with_suffix(".py"))
        elif (place / "__init__.py").is_file():
            found.add(place / "__init__.py")
    return found


def reachable(*starts: Path) -> set[Path]:
    """The project's own files that are loaded, or may be, when these are."""
    seen, todo = set(starts), list(starts)
    while todo:
        new = own(todo.pop()) - seen
        seen |= new
        todo += new
    return seen


def test_every_module_has_a_layer():
    assert {path.stem for path in MODULES} == set(RANK)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_only_from_the_layers_below_it(path):
    used = {other.stem for other in own(path) if other.parent.name == "app"}
    assert {name for name in used if RANK[name] >= RANK[path.stem]} == set()


@pytest.mark.parametrize(
    ("allowed", "libraries"),
    [
        ({"session"}, {"onnxruntime"}),
        ({"main", "service", "server", "protocol", "engine", "routes", "oip", "edge", "exchange"}, WEB),
        ({"task"}, {"tokenizers"}),
        ({"settings"}, {"pydantic", "pydantic_settings"}),
        ({"metrics", "gpu", "totals"}, {"prometheus_client"}),
        ({"gpu"}, {"pynvml"}),
        ({"logs"}, {"structlog", "logging"}),
    ],
    ids=["ONNX Runtime", "web framework", "tokenizers", "pydantic", "Prometheus", "NVML", "logging"],
)
def test_a_library_is_known_only_where_it_belongs(allowed, libraries):
    users = {path.stem for path in MODULES if packages(path) & libraries}
    assert users <= allowed


@pytest.mark.parametrize("library", ["onnxruntime", "fastapi", "uvicorn"])
def test_the_check_on_libraries_sees_the_ones_in_use(library):
    assert any(library in packages(path) for path in MODULES)


@pytest.mark.parametrize("name", ["batcher", "rowqueue"])
def test_batching_knows_neither_the_web_nor_the_model_runtime(name):
    foreign = WEB | {"onnxruntime", "numpy", "tokenizers", "msgspec", "pydantic", "pydantic_settings"}
    for path in reachable(ROOT / "app" / f"{name}.py"):
        assert packages(path) & foreign == set(), path.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_fits_in_260_lines(path):
    assert len(path.read_text().splitlines()) <= 260


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_opens_by_saying_what_it_does(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert text.strip()


def setdefault(node: ast.AST) -> bool:
    """Whether this is `os.environ.setdefault(...)`: telling a library something, not reading it."""
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "os.environ.setdefault"


def environment_readers() -> set[str]:
    readers = set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        told = {id(part) for node in ast.walk(tree) if setdefault(node) for part in ast.walk(node)}
        for node in ast.walk(tree):
            named = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")
            imported = isinstance(node, ast.ImportFrom) and node.module == "os"
            if (named and id(node) not in told) or imported:
                readers.add(path.stem)
    return readers


def test_the_environment_is_read_in_settings_only():
    assert environment_readers() == {"settings"}


def test_libraries_are_told_things_through_the_environment_only_before_they_load():
    tellers = {path.stem for path in MODULES for node in ast.walk(ast.parse(path.read_text())) if setdefault(node)}
    assert tellers <= {"__init__", "session"}


def test_the_server_needs_nothing_from_the_models_tools():
    assert {path.name for path in reachable(*MODULES) if path.parent.name != "app"} == set()


@pytest.mark.parametrize("start", ["app/main.py", "model/package.py", "model/verify.py"])
def test_serving_packaging_and_verifying_need_no_training_library(start):
    for path in reachable(ROOT / start):
        assert packages(path) & TRAINING == set(), path


def test_a_front_end_does_not_load_the_model_runtime():
    """It would take memory and time in each of them."""
    loaded = {path.stem for path in MODULES if "onnxruntime" in packages(path)}
    assert loaded == {"session"}
    assert "session" not in {path.stem for path in reachable(ROOT / "app" / "front.py")}


def test_nothing_runs_when_a_module_is_imported():
    calls = {
        path.stem
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and not setdefault(node.value)
    }
    assert calls == {"__main__"}

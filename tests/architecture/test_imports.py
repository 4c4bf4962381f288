"""Light parts stay light, and nothing is imported that the package does not declare."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "numpy", "aiohttp", "matplotlib", "datasets", "tensorboard")
LIGHT = ("dovetail", "dovetail.types", "dovetail.config", "dovetail.hooks", "dovetail.cli")


def _modules_below(package: str) -> list[str]:
    folder = ROOT / package.replace(".", "/")
    if package == "dovetail":
        return [package]
    files = sorted(folder.rglob("*.py"))
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("package", LIGHT)
def test_light_packages_import_nothing_heavy(package: str) -> None:
    modules = _modules_below(package)
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]", f"{package} imports {out.stdout}"


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def _distribution(name: str) -> str:
    """Its name as the registries compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


# A module that runs in an engine's server, in the environment of that engine.
IN_SERVERS = {"vllm"}


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    declared = {_distribution(re.split(r"[<>=\[ ]", line)[0]) for line in wanted}
    owners = packages_distributions()
    missing = {}
    for path in sorted((ROOT / "dovetail").rglob("*.py")):
        for name in _imported(path) - sys.stdlib_module_names - {"dovetail"}:
            dists = {_distribution(dist) for dist in owners.get(name, [name])}
            if not dists & declared and not (name in IN_SERVERS and "in_server" in path.parts):
                missing[name] = path.relative_to(ROOT).as_posix()
    assert not missing, f"imported but not in pyproject.toml: {missing}"


def test_no_unsafe_loader_is_used_anywhere() -> None:
    unsafe = re.compile(
        r"\b(pickle|cPickle|dill|cloudpickle)\.loads?\b|\bimport pickle\b|\btorch\.load\(|"
        r"\byaml\.load\(|shell=True|(?<![\w.])(?<!def )(eval|exec)\("
    )
    files = [p for d in ("dovetail", "examples", "benchmarks") for p in (ROOT / d).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if unsafe.search(line)
    ]
    assert found == []

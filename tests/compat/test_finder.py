"""Foreign addresses are our modules, identical objects; and only where nothing else is there."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dovetail.types
import dovetail.types.sample
from dovetail import compat
from dovetail.compat.finder import SHIMS, aliases

pytestmark = pytest.mark.usefixtures("aliases_on")
ROOT = Path(__file__).resolve().parents[2]


def python(*words: str, cwd: Path = ROOT, path: str = "") -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds dovetail, and `path` before everything else."""
    entries = [entry for entry in (path, str(ROOT)) if entry]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entries)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_one_sample_class_stands_behind_every_family() -> None:
    import miles.utils.types
    import slime.utils.types
    import vime.utils.types

    assert slime.utils.types is dovetail.types.sample
    assert slime.utils.types is vime.utils.types is miles.utils.types
    assert slime.utils.types.Sample is dovetail.types.Sample


def test_our_module_keeps_its_own_name_and_spec() -> None:
    import slime.utils.types

    assert slime.utils.types.__name__ == "dovetail.types.sample"
    assert slime.utils.types.__spec__.name == "dovetail.types.sample"
    assert importlib.import_module("dovetail.types.sample") is slime.utils.types


def test_patching_an_aliased_module_reaches_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime.utils.misc.get_free_port", lambda: 17)
    from dovetail.compat.modules import misc

    assert misc.get_free_port() == 17


def test_a_package_in_between_leads_to_what_is_below_it() -> None:
    import slime

    assert slime.utils.misc.SingletonMeta.__name__ == "SingletonMeta"
    assert {"utils", "rollout"} <= set(dir(slime))
    assert not hasattr(slime, "nothing_of_this_name")


def test_the_old_and_the_new_address_of_a_moved_module_are_one() -> None:
    import slime.observability.timer
    import slime.utils.timer

    assert slime.utils.timer is slime.observability.timer


def test_every_row_names_a_module_that_imports() -> None:
    for ours in sorted(set(aliases().values())):
        importlib.import_module(ours)


def test_every_address_imports_and_is_the_module_of_its_row() -> None:
    for name, ours in aliases().items():
        assert importlib.import_module(name) is importlib.import_module(ours)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import slime.utils.type", "did you mean slime.utils.types"),
        ("from slime.utils import typez", "did you mean slime.utils.types"),
        ("import vime.rollout.sglang_rollout", "vime.rollout.vllm_rollout"),
        ("from miles import rolout", "dovetail has no miles.rolout"),
        ("from slime.utils.types import Sampel", "did you mean Sample"),
        ("from slime.utils.misc import nothing", "it has "),
        ("import slime.ray.placement_group", "--list"),
    ],
)
def test_what_is_not_covered_says_what_is(line: str, said: str) -> None:
    with pytest.raises(ImportError) as caught:
        FunctionOf(line)()
    assert said in str(caught.value)


class FunctionOf:
    """A line of source as something to call."""

    def __init__(self, line: str) -> None:
        from types import FunctionType

        self.run = FunctionType(compile(line, "<line>", "exec"), {})

    def __call__(self) -> None:
        self.run()


def test_a_name_that_is_missing_is_still_an_attribute_error_for_getattr() -> None:
    import slime.utils.types

    assert getattr(slime.utils.types, "Nope", 5) == 5


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="verl"):
        compat.install(families=("verl",))


def test_one_family_alone_can_be_installed() -> None:
    compat.uninstall()
    compat.install(families=("miles",))
    importlib.import_module("miles.utils.types")
    with pytest.raises(ModuleNotFoundError, match="No module named 'slime'"):
        importlib.import_module("slime")


def test_installing_twice_is_installing_once_and_uninstalling_undoes_it() -> None:
    compat.install()
    compat.install()
    slime = str(SHIMS / "slime")
    assert sys.path.count(slime) == 1
    assert os.environ["PYTHONPATH"].split(os.pathsep).count(slime) == 1
    importlib.import_module("slime.utils.types")
    compat.uninstall()
    assert slime not in sys.path and slime not in os.environ.get("PYTHONPATH", "")
    with pytest.raises(ModuleNotFoundError, match="No module named 'slime'"):
        importlib.import_module("slime.utils.types")


def test_without_installing_nothing_is_there() -> None:
    out = python("-c", "import dovetail.compat, slime")
    assert "No module named 'slime'" in out.stderr


@pytest.mark.parametrize("first", [True, False], ids=["before the shims", "behind the shims"])
def test_a_real_package_on_the_path_wins(tmp_path: Path, first: bool) -> None:
    real = tmp_path / "site" / "slime" / "utils"
    real.mkdir(parents=True)
    (real.parent / "__init__.py").write_text("REAL = True\n")
    (real / "__init__.py").write_text("")
    (real / "types.py").write_text("class Sample: real = True\n")
    position = "0" if first else "len(sys.path)"
    code = f"""
        import sys
        import dovetail.compat
        dovetail.compat.install()
        sys.path.insert({position}, {str(real.parents[1])!r})
        from slime.utils.types import Sample
        import slime
        assert Sample.real and slime.REAL, slime
        import miles.utils.types, dovetail.types
        assert miles.utils.types.Sample is dovetail.types.Sample
    """
    out = python("-c", textwrap.dedent(code))
    assert out.returncode == 0, out.stderr


def test_a_directory_of_the_name_in_the_working_directory_is_not_shadowed(tmp_path: Path) -> None:
    (tmp_path / "miles").mkdir()
    (tmp_path / "miles" / "mine.py").write_text("VALUE = 3\n")
    out = python(
        "-m", "dovetail.compat", "-c", "import miles.mine as m; print(m.VALUE)", cwd=tmp_path
    )
    assert out.stdout == "3\n", out.stderr
    out = python("-m", "dovetail.compat", "-c", "import miles.utils.types", cwd=tmp_path)
    assert "No module named 'miles.utils'" in out.stderr


def test_a_module_file_of_the_name_in_the_working_directory_is_not_shadowed(tmp_path: Path) -> None:
    (tmp_path / "slime.py").write_text("VALUE = 4\n")
    out = python("-m", "dovetail.compat", "-c", "import slime; print(slime.VALUE)", cwd=tmp_path)
    assert out.stdout == "4\n", out.stderr


SPAWNING = """
import multiprocessing
import sys

from slime.utils.types import Sample


def double(sample: Sample) -> Sample:
    from vime.utils.types import Sample as Other
    assert type(sample) is Other
    sample.response_length *= 2
    return sample


if __name__ == "__main__":
    import subprocess

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [Sample(response_length=21)])[0].response_length, sys.argv[1:])
    code = "import miles.utils.types as t, dovetail.types; print(t.Sample is dovetail.types.Sample)"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True))
"""


def test_spawned_and_started_children_see_the_aliases_too(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(SPAWNING)
    out = python("-m", "dovetail.compat", "work.py", "--flag", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("42 ['--flag']\n")
    assert "stdout='True" in out.stdout


def test_pytest_runs_under_the_aliases(tmp_path: Path) -> None:
    (tmp_path / "test_plugin.py").write_text(
        "from slime.utils.types import Sample\n\n"
        "def test_it(monkeypatch):\n"
        "    monkeypatch.setattr('slime.utils.misc.get_free_port', lambda: 5)\n"
        "    from slime.utils import misc\n"
        "    assert misc.get_free_port() == 5 and Sample().status is Sample.Status.PENDING\n"
    )
    words = ("-m", "dovetail.compat", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    out = python(*words, "test_plugin.py", cwd=tmp_path)
    assert "1 passed" in out.stdout, out.stdout + out.stderr


def test_an_exit_code_and_a_traceback_pass_through(tmp_path: Path) -> None:
    assert python("-m", "dovetail.compat", "-c", "raise SystemExit(7)").returncode == 7
    out = python("-m", "dovetail.compat", "-c", "1 / 0")
    assert out.returncode == 1 and "ZeroDivisionError" in out.stderr
    assert python("-m", "dovetail.compat").returncode == 2


def test_the_list_shows_every_name() -> None:
    out = python("-m", "dovetail.compat", "--list")
    assert "miles.rollout.inference_rollout.inference_rollout_common" in out.stdout
    assert len(out.stdout.splitlines()) == len(aliases())


def test_installing_imports_nothing_heavy() -> None:
    code = """
        import sys
        import dovetail.compat
        dovetail.compat.install()
        from slime.utils.types import Sample
        heavy = {"torch", "numpy", "aiohttp", "transformers", "pydantic"} & set(sys.modules)
        assert not heavy, heavy
    """
    out = python("-c", textwrap.dedent(code))
    assert out.returncode == 0, out.stderr

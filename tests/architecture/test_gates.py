import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.config.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted(
    path for folder in ("examples", "recipes") for path in (ROOT / folder).rglob("*.toml")
)


def test_every_folder_imports_lower_layers_only() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_run_file_resolves(path: Path) -> None:
    resolved = resolve([path])
    assert resolved.notes == ()

"""The table of engines names classes that exist, and importing it loads nothing heavy."""

import importlib
import subprocess
import sys

from dovetail.engines.table import ENGINES
from dovetail.types.ports import Engine, EngineControl


def test_rows_name_classes_that_have_both_contracts():
    for row in ENGINES:
        if row.path is None:
            assert row.launch and row.client
            continue
        module, name = row.path.split(":")
        engine = getattr(importlib.import_module(module), name)
        promised = {m for c in (Engine, EngineControl) for m in vars(c) if not m.startswith("_")}
        assert promised <= set(dir(engine))
        assert row.doc.endswith(".")


def test_the_table_imports_without_torch():
    code = "import sys, dovetail.engines.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

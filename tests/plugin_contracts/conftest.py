"""Makes the files of this folder importable by each other, wherever the folder was copied to, and
leaves out the tests of hooks that no function was given for."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """Without parameters there is nothing to test; pytest alone would report each as skipped."""
    items[:] = [item for item in items if "NOTSET" not in item.name]

"""Makes the files of this folder importable by each other, wherever the folder was copied to."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

"""Puts the training scripts on the import path, as running one of them would."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "models" / "training"))

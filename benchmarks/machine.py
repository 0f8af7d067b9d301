"""What the figures of a benchmark depend on: the machine, and what is installed."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mini_infer


def environment(*packages: str) -> dict[str, Any]:
    """Describes this machine.

    Args:
        packages: Installed ones whose versions matter, beside Mini-Infer's own.
    """
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    # Mini-Infer itself may run from a checkout that is not installed.
    versions = {"mini-infer": mini_infer.__version__}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions | {name: version(name) for name in packages},
        "cpu": names[0] if names else platform.processor(),
        "num_cores": len(os.sched_getaffinity(0)),
    }

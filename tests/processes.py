"""Processes that tests start."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment():
    """In which a script finds this package and these tests, and keeps to one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def printed_by(command, folder, limit=180):
    """What a command prints that runs in a folder and ends well."""
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout

"""Killed at random moments, a run leaves whole files and comes to the same end; benchmarks/kill.py does 200."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kill.py"


def test_a_killed_run_comes_to_the_same_end() -> None:
    command = [sys.executable, str(SCRIPT), "--times", "2", "--seed", "1", "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "killed 2 times" in done.stdout

"""Runs small programs in fresh processes, where nothing of this test run has been imported."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

__all__ = ["run_fresh"]

_LIMIT = 600


def run_fresh(program: str, task: Any) -> Any:
    """Run ``program`` in a new interpreter and return what it says.

    The program finds ``task`` (plain data) as JSON in ``sys.argv[1]`` and prints one line of JSON last. Raises
    :class:`AssertionError` with the end of its error output when it fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(task)], capture_output=True, text=True, timeout=_LIMIT, check=False
    )
    if done.returncode:
        raise AssertionError(f"the fresh process ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])

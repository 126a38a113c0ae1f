"""Makes ``golden`` importable: tests are collected with ``--import-mode=importlib``, which leaves sys.path alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

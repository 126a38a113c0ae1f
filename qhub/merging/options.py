"""What the caller of a merge asks for; PEFT's own calls take no such arguments, so they hold for a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal

from qhub.errors import ConfigError

__all__ = ["MergeOptions", "current_options", "merging_with"]


@dataclass(frozen=True)
class MergeOptions:
    """Says how adapters are merged into quantized weights.

    ``grid``: ``"keep"`` or ``"refit"`` the scales; ``"best"``: by measured output error; None: as the method's policy
    says. ``data``: texts, token ids, a file or anything else that :func:`qhub.calibration.data.samples_of` takes;
    None: what the model writes itself. ``tokenizer``: for data that are text. ``samples``, ``length``: how much of it,
    in samples and tokens each; 0 samples: measure nothing, round each weight to nearest. ``seed``: of the text.
    """

    grid: Literal["keep", "refit", "best"] | None = None
    data: Any = None
    tokenizer: Any = None
    samples: int = 16
    length: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grid not in (None, "keep", "refit", "best"):
            raise ConfigError(f"grid={self.grid!r}: a merge can keep the grid, refit it, or take the best of both")
        if self.samples < 0 or self.length < 2:
            raise ConfigError(
                f"{self.samples} samples of {self.length} tokens: give 0 or more samples of at least 2 tokens"
            )


_current: ContextVar[MergeOptions | None] = ContextVar("qhub_merging", default=None)


def current_options() -> MergeOptions:
    """Return what the innermost :func:`merging_with` asks for, or the defaults."""
    return _current.get() or MergeOptions()


@contextmanager
def merging_with(**options: Any) -> Iterator[MergeOptions]:
    """Make merges inside the block use ``options``, fields of :class:`MergeOptions`.

    With them PEFT's own ``merge_adapter`` and ``merge_and_unload`` can be told what to do. Raises
    :class:`ConfigError` for a value that cannot be.
    """
    chosen = replace(current_options(), **options)
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)

"""Gives back file pages and freed memory while a model is quantized, which the process would hold until the end.

transformers maps every shard and closes none before the last weight is read, so the pages of a whole 16-bit model would
count as the process's; and the C library keeps the freed temporaries of one weight in its heap, pinned by the packed
weights allocated between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path

from qhub.heap import libc, trim

__all__ = ["Releaser"]

# Bytes read between two releases, each of which takes 2 to 5 ms: often enough to stay far below a shard, and seldom
# enough to cost little. Choosing the codes of as much takes 8 (LLM.int8()) to 150 ms (HQQ).
_INTERVAL = 4 << 20
_MADV_DONTNEED = 4


class Releaser:
    """Gives memory back while the weights of ``files`` are quantized one after the other; does nothing but on Linux.

    Make it before the files are mapped. Mappings of the same files that are there already hold the weights of other
    models, which may have been written into (training, folded scales): a page of theirs that is dropped would come back
    as the file has it, so they are left alone.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = {str(file.resolve()) for file in files}
        self._others = list(self._mappings()) if libc() is not None else []
        self._pending = 0

    def done_with(self, nbytes: int) -> None:
        """Note that ``nbytes`` of the files were read and are not needed again."""
        self._pending += nbytes
        if self._pending >= _INTERVAL:
            self._pending = 0
            self.release()

    def release(self) -> None:
        """Drop clean pages of the files from memory (they are read again if touched) and trim the heap."""
        library = libc()
        if library is None:
            return
        for start, end in self._mappings():
            if any(start < other_end and other_start < end for other_start, other_end in self._others):
                continue
            # Private mappings that nothing writes to while loading: dropping a page loses nothing.
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
        trim()

    def _mappings(self) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of each mapping of the files in this process."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in self._files:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                yield start, end

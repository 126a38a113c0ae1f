"""Launches a compiled kernel with little work for the host.

``kernel[grid](...)`` looks at every argument anew, to see what it was compiled for: 20 to 50 microseconds. A weight's
arguments do not change, so a :class:`Launch` compiles once and hands the addresses straight to the compiled kernel.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Launch", "hopper", "interpreted", "memory", "native", "overlaps", "processors", "stream_of"]


def interpreted(kernel: Any) -> bool:
    """Return whether ``kernel`` runs in triton's interpreter."""
    return not hasattr(kernel, "device_caches")


def native(device: torch.device) -> bool:
    """Return whether kernels for ``device`` may hold instructions of NVIDIA's (compute capability 8.0 and later)."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def overlaps(device: torch.device) -> bool:
    """Return whether a kernel on ``device`` can begin while the one before it ends (compute capability 9.0)."""
    return native(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def hopper(device: torch.device) -> bool:
    """Return whether ``device`` is of compute capability 9; elsewhere than on a GPU, as an H100 is."""
    if device.type != "cuda":
        return True
    return native(device) and torch.cuda.get_device_capability(device)[0] == 9


def memory(device: torch.device) -> int:
    """Return how many bytes of shared memory a program on ``device`` may have; elsewhere than on a GPU, an H100's."""
    if device.type != "cuda":
        return 227 << 10
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 << 10)


def processors(device: torch.device) -> int:
    """Return how many multiprocessors ``device`` has; elsewhere than on a GPU, an H100's."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def stream_of(device_index: int) -> int:
    """Return the current stream of a GPU."""
    return torch._C._cuda_getCurrentRawStream(device_index)


class Launch:
    """Is ``kernel`` for one set of compile-time values.

    ``constants``: its constexpr arguments, which come last. ``options``: num_warps, num_stages and the like. Called
    with a grid and the other arguments in order, tensors among them. What decides for what a kernel is compiled must be
    the same in all calls: dtypes, which integers are 1 or a multiple of 16, and whether pointers are; where that can
    change, the kernel says ``do_not_specialize``, or the caller keeps a launch for each case. ``plain``: the types of
    arguments that are handed on as they are; others are tensors.
    """

    def __init__(
        self,
        kernel: Any,
        constants: dict[str, Any],
        options: dict[str, Any],
        plain: frozenset[type] = frozenset({int}),
    ) -> None:
        self.kernel, self.constants, self.options, self.plain = kernel, constants, options, plain
        self.values = tuple(constants.values())
        self.fast: Any = None
        self.device = -1

    def __call__(self, grid: tuple[int, int, int], device: int, *arguments: Any) -> None:
        """Run the kernel on GPU number ``device``, the current one or not; -1: what is no GPU of CUDA or ROCm."""
        fast = self.fast
        # A kernel is loaded for one GPU, and launched while that is the current one.
        if fast is not None and device == self.device == torch._C._cuda_getDevice():
            plain = self.plain
            addresses = [a if type(a) in plain else a.data_ptr() for a in arguments]
            fast.run(
                *grid, stream_of(device), fast.function, fast.packed_metadata, None, None, None, *addresses,
                *self.values,
            )  # fmt: skip
            return
        if device < 0 or interpreted(self.kernel):
            self.kernel[grid](*arguments, **self.constants, **self.options)
            return
        with torch.cuda.device(device):
            compiled = self.kernel[grid](*arguments, **self.constants, **self.options)
        # A triton whose compiled kernels are not run this way is asked each time instead.
        if hasattr(compiled, "packed_metadata") and hasattr(compiled, "run"):
            self.fast, self.device = compiled, device

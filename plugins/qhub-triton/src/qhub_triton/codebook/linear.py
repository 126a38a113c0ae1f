"""The product with a weight of vectors: what kernels need is gathered once per weight, the way chosen by rows of input.

One row of input and two codebooks of at most 256 vectors: sums of products are tabulated first
(:mod:`qhub_triton.codebook.tabulated`). Up to 16 rows: fragments for matrix units are looked up
(:mod:`qhub_triton.codebook.fragments`), or tiles where the GPU is not NVIDIA's (:mod:`qhub_triton.codebook.portable`).
More: the stored matrix is written dense in float16 and multiplied. Inputs are rotated before and outputs after, so the
weight never is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from qhub.layouts import Codebook, Layout, Parts
from qhub_triton.codebook.expansion import expand_kernel
from qhub_triton.codebook.portable import finish_kernel, product_kernel
from qhub_triton.codebook.reading import Reading, reading
from qhub_triton.codebook.turning import Turning
from qhub_triton.launch import Launch, interpreted, native, overlaps

if TYPE_CHECKING:
    from qhub_triton.codebook.few import Few

__all__ = ["bind", "dequantize", "linear"]

# Rows of input up to which vectors are looked up for the product alone.
_FEW = 16
# A program of the portable product: rows of the weight, blocks at a time.
_TILE = (32, 16)


def linear(
    x: Tensor, layout: Layout, parts: Parts, bias: Tensor | None = None, config: dict[str, Any] | None = None
) -> Tensor:
    """Return ``x @ W.T + bias`` for x (M, K) contiguous, in x's dtype; ``config``: see :func:`bind`."""
    return bind(layout, parts, x.dtype, config)(x, bias)


def bind(
    layout: Layout, parts: Parts, dtype: torch.dtype, config: dict[str, Any] | None = None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what computes ``x @ W.T + bias`` for x (M, K) contiguous of ``dtype``, bias (N,) of ``dtype`` or None.

    ``config``, all optional: ``few``: rows of input up to which vectors are looked up; ``native``: False for the
    portable kernels on any GPU; ``warps``, ``tall``: of a program of fragments; ``tables``: a program of tables, see
    :class:`qhub_triton.codebook.few.Few`, or False for fragments instead.
    """
    assert isinstance(layout, Codebook)
    return Product(layout, parts, dtype, config or {})


def dequantize(layout: Layout, parts: Parts, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) of a layout without transforms, in ``dtype``."""
    assert isinstance(layout, Codebook)
    found = reading(layout)
    assert isinstance(found, Reading)
    out = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=parts["codes"].device)
    Expansion(layout, found, parts)(out, scaled=True)
    return out


def _few(layout: Codebook, parts: Parts, config: dict[str, Any]) -> Few | None:
    # What it imports is for NVIDIA's GPUs alone.
    from qhub_triton.codebook.few import few_of

    return few_of(layout, parts, config)


def _index(device: torch.device) -> int:
    return (device.index or 0) if device.type == "cuda" else -1


def _constants(layout: Codebook, found: Reading) -> dict[str, Any]:
    """Return the compile-time values that say how codes are read."""
    count = len(layout.nbits)
    return {
        "PLACES": found.places,
        "STRIDE": found.stride,
        "NBITS": layout.nbits,
        "SHIFTS": layout.folded or (None,) * count,
        "DIVISORS": layout.divisors or (1.0,) * count,
        "E": found.entries,
        "G": layout.in_group,
    }


def _bytes(parts: Parts) -> Tensor:
    return parts["codes"].view(torch.int8)


class Expansion:
    """Writes a weight's stored matrix."""

    def __init__(self, layout: Codebook, found: Reading, parts: Parts) -> None:
        self.layout, self.found, self.parts = layout, found, parts
        self.index = _index(parts["codes"].device)
        self.launches: dict[Any, Launch] = {}

    def __call__(self, out: Tensor, scaled: bool) -> None:
        """Write ``out`` (N, K); ``scaled``: times the scales."""
        layout, found = self.layout, self.found
        blocks = layout.in_features // layout.in_group
        rows, width = 4, max(256 // layout.in_group, 8)
        launch = self.launches.get((out.dtype, scaled))
        if launch is None:
            constants = {**_constants(layout, found), "SCALED": scaled, "BN": rows, "BB": width}
            # No multiply-add in one rounding: the layout rounds twice.
            launch = self.launches[out.dtype, scaled] = Launch(
                expand_kernel, constants, {"num_warps": 4, "enable_fp_fusion": False}
            )
        launch(
            (-(-blocks // width), -(-layout.out_features // rows), 1), self.index, _bytes(self.parts),
            self.parts["codebooks"], self.parts["scales"], out, layout.out_features, blocks, blocks * found.stride,
            layout.in_features, found.scale_rows,
        )  # fmt: skip


class Product:
    """Holds one weight's arguments and launches."""

    def __init__(self, layout: Codebook, parts: Parts, dtype: torch.dtype, config: dict[str, Any]) -> None:
        found = reading(layout)
        assert isinstance(found, Reading), found
        self.layout, self.found, self.parts, self.dtype = layout, found, parts, dtype
        self.n, self.k = layout.out_features, layout.in_features
        self.blocks = self.k // layout.in_group
        self.device = parts["codes"].device
        self.index = _index(self.device)
        self.few_rows = int(config.get("few", _FEW))
        self.wide = interpreted(product_kernel)
        self.overlaps = self.index >= 0 and overlaps(self.device)
        self.expansion = Expansion(layout, found, parts)
        self.inputs = Turning(found.inputs, self.k, parts, self.index, narrow=True, wide=self.wide)
        self.outputs = Turning(found.outputs, self.n, parts, self.index, narrow=False, wide=self.wide)
        self.config = config
        self.native = self.index >= 0 and native(self.device)
        usual = self.native and config.get("native", True)
        self.few: Few | None = _few(layout, parts, config) if usual else None
        self.launches: dict[Any, Launch] = {}

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        m = x.shape[0]
        inputs, outputs = self.found.inputs, self.found.outputs
        if m > self.few_rows and inputs.idle and outputs.idle:
            weight = torch.empty(self.n, self.k, dtype=x.dtype, device=x.device)
            self.expansion(weight, scaled=True)
            return torch.nn.functional.linear(x, weight, bias)
        # What a graph replays is steady: no kernel in it writes the weights that the next one reads too early.
        overlap = self.overlaps and torch.cuda.is_current_stream_capturing()
        few = self.few
        if few is not None and few.stale():
            few = self.few = _few(self.layout, self.parts, self.config)
        if few is not None and m == 1 and few.tabulates and inputs.idle and outputs.idle:
            return few.tabulated(x, bias, self.found.scale_rows, overlap)
        lengths: Tensor | None = None
        sums: Tensor | None = None
        if not inputs.idle or (few is not None and (few.words is not None or x.dtype != torch.float16)):
            narrowed = torch.empty(m, self.k, dtype=torch.float16, device=x.device)
            lengths = torch.empty(m, dtype=torch.float32, device=x.device)
            sums = torch.empty(m, self.inputs.programs, 2, dtype=torch.float32, device=x.device)
            self.inputs(x, narrowed, lengths, sums, None, None, 1, overlap)
            x = narrowed
        if m > self.few_rows:
            partial = self._dense(x)
        else:
            partial = self._portable(x) if few is None else few.fragments(x, sums, overlap)
        y = torch.empty(m, self.n, dtype=self.dtype, device=x.device)
        if outputs.idle:
            self._finish(partial, lengths, bias, y, scaled=True, overlap=overlap)
            return y
        if partial.shape[0] > 1:
            whole = torch.empty(1, m, self.n, dtype=torch.float32, device=x.device)
            self._finish(partial, None, None, whole, scaled=False, overlap=overlap)
            partial = whole
        if lengths is None:
            lengths = torch.ones(m, dtype=torch.float32, device=x.device)
        self.outputs(partial[0], y, lengths, None, bias, self.parts["scales"], self.found.scale_rows, overlap)
        return y

    def _dense(self, x: Tensor) -> Tensor:
        """Return x (M, K) float16 times the stored matrix, (1, M, N) float32."""
        weight = torch.empty(self.n, self.k, dtype=torch.float16, device=x.device)
        self.expansion(weight, scaled=False)
        if self.native:
            return torch.mm(x, weight.t(), out_dtype=torch.float32).unsqueeze(0)
        return torch.mm(x.float(), weight.float().t()).unsqueeze(0)

    def _portable(self, x: Tensor) -> Tensor:
        """Return x (M, K) times the stored matrix, (splits, M, N) float32."""
        m, (rows, width) = x.shape[0], _TILE
        block_m = max(16, triton.next_power_of_2(m))
        steps = -(-self.blocks // width)
        # About four programs for each of some hundred processors.
        splits = max(1, min(steps, 512 // -(-self.n // rows)))
        depth = -(-steps // splits) * width
        splits = -(-self.blocks // depth)
        key = ("portable", block_m, x.dtype, x.data_ptr() % 16)
        launch = self.launches.get(key)
        if launch is None:
            constants = {
                **_constants(self.layout, self.found), "BM": block_m, "BN": rows, "BB": width, "WIDE": self.wide,
            }  # fmt: skip
            launch = self.launches[key] = Launch(product_kernel, constants, {"num_warps": 4, "num_stages": 1})
        partial = torch.empty(splits, m, self.n, dtype=torch.float32, device=x.device)
        launch(
            (-(-self.n // rows), splits, -(-m // block_m)), self.index, x, _bytes(self.parts), self.parts["codebooks"],
            partial, m, self.n, self.blocks, self.blocks * self.found.stride, depth,
        )  # fmt: skip
        return partial

    def _finish(
        self, partial: Tensor, lengths: Tensor | None, bias: Tensor | None, y: Tensor, scaled: bool, overlap: bool
    ) -> None:
        """Write the sum of ``partial`` (splits, M, N) to ``y`` (M, N), scaled and biased."""
        splits, m, n = partial.shape
        aligned = bias is None or bias.data_ptr() % 16 == 0
        key = ("finish", splits > 1, lengths is None, bias is None, aligned, y.dtype, scaled, overlap)
        launch = self.launches.get(key)
        wide = 64 if splits > 1 else 256
        if launch is None:
            constants = {
                "HAS_SCALES": scaled, "HAS_LENGTHS": lengths is not None, "HAS_BIAS": bias is not None,
                "OVERLAP": overlap, "BS": min(32, triton.next_power_of_2(splits)), "BN": wide,
            }  # fmt: skip
            extra = {"launch_pdl": True} if overlap else {}
            launch = self.launches[key] = Launch(finish_kernel, constants, {"num_warps": 4, **extra})
        launch(
            (-(-n // wide), m, 1), self.index, partial, self.parts["scales"], partial if lengths is None else lengths,
            partial if bias is None else bias, y, m, n, self.found.scale_rows, splits,
        )  # fmt: skip

"""What a method can know of a layer's inputs: sums and maxima over tokens, so that samples, batches and processes just
add up.

With x (K,) the input of one token, T tokens, all in float32:

=========== ======= ==============================================================================================
name        shape   value
=========== ======= ==============================================================================================
hessian     (K, K)  mean of x x^T: half the second derivative of the squared output error by a row of the weight
                    (Frantar et al. 2022, "GPTQ", section 3.1, without the factor 2)
cross       (K, K)  mean of x_float x^T; rows: the same input in the unquantized model. With it the error against the
                    unquantized model's output can be minimised (Li et al. 2025, "GPTAQ", section 3)
mean_abs    (K,)    mean of |x| (Lin et al. 2023, "AWQ", section 3.2)
mean_square (K,)    mean of x^2, the diagonal of ``hessian``: what the error of a column costs (llama.cpp's importance
                    matrix)
max_abs     (K,)    largest |x| of each feature: what a stored input scale has to reach (Xiao et al. 2023,
                    "SmoothQuant", section 4)
tokens      ()      T; always there
=========== ======= ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qhub.errors import ConfigError

__all__ = ["MAXIMA", "STATISTICS", "Sums", "check_names", "needs_float_stream", "neutral", "rescaled"]

# Of a symmetric product on a CPU.
_BLOCKS, _SMALLEST_BLOCK = 4, 256

STATISTICS = ("cross", "hessian", "max_abs", "mean_abs", "mean_square", "tokens")
# Those of which the largest counts where others are added: over batches, and over processes.
MAXIMA = frozenset({"max_abs"})


def check_names(names: Iterable[str]) -> None:
    """Raise :class:`ConfigError` for a statistic that the engine does not have."""
    unknown = sorted(set(names) - set(STATISTICS))
    if unknown:
        raise ConfigError(f"the plan asks for the statistics {unknown}; the engine has {list(STATISTICS)}")


def needs_float_stream(names: Iterable[str]) -> bool:
    """Return whether the unquantized model's inputs are needed beside the quantized one's."""
    return "cross" in set(names)


class Sums:
    """Adds up the statistics ``names`` of an input with ``features`` features, in float32 on ``device``."""

    def __init__(self, names: Iterable[str], features: int, device: torch.device) -> None:
        self.names = sorted(set(names) - {"tokens"})
        check_names(self.names)
        self.tokens = 0
        square, row = (features, features), (features,)
        shapes = {"hessian": square, "cross": square, "mean_abs": row, "mean_square": row, "max_abs": row}
        self.tensors = {name: torch.zeros(shapes[name], device=device) for name in self.names}

    def add(self, x: Tensor, x_float: Tensor | None = None) -> None:
        """Add tokens ``x`` (tokens, K) of any float dtype; ``x_float``: the same tokens in the unquantized model."""
        self.tokens += x.shape[0]
        if "hessian" in self.tensors:
            _add_product(self.tensors["hessian"], x, x)
        if "cross" in self.tensors:
            assert x_float is not None
            _add_product(self.tensors["cross"], x_float, x)
        if "mean_abs" in self.tensors:
            self.tensors["mean_abs"] += x.abs().sum(0, dtype=torch.float32)
        if "mean_square" in self.tensors:
            self.tensors["mean_square"] += x.float().square().sum(0)
        if "max_abs" in self.tensors and x.shape[0]:
            torch.maximum(self.tensors["max_abs"], x.abs().amax(0).float(), out=self.tensors["max_abs"])

    def means(self) -> dict[str, Tensor]:
        """Return the statistics by name, ``tokens`` among them."""
        count = max(self.tokens, 1)
        values = {name: value if name in MAXIMA else value / count for name, value in self.tensors.items()}
        if "hessian" in values:
            upper = values["hessian"].triu()
            values["hessian"] = upper + upper.triu(1).t()
        return {**values, "tokens": torch.tensor(self.tokens)}


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a.T @ b`` to ``total``, the products of 16-bit numbers exact and their sum in float32.

    For ``a is b``, a symmetric product, only blocks on and above the diagonal are sure to be added on a CPU:
    :meth:`Sums.means` mirrors them.
    """
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and a.dtype == b.dtype:
        # Tensor cores multiply 16-bit numbers exactly and add in float32.
        total += torch.mm(a.t(), b, out_dtype=torch.float32)
        return
    wide = a.float()
    if b is not a:
        total.addmm_(wide.t(), b.float())
        return
    features = wide.shape[1]
    size = features if a.is_cuda else max(-(-features // _BLOCKS), _SMALLEST_BLOCK)
    for start in range(0, features, size):
        # A third of the work is left out with four blocks.
        total[start : start + size, start:].addmm_(wide[:, start : start + size].t(), wide[:, start:])


def neutral(names: Iterable[str], features: int, device: torch.device) -> dict[str, Tensor]:
    """Return statistics that say nothing: every feature alike and none related to another; ``tokens`` is 0."""
    eye = torch.eye(features, device=device)
    ones = torch.ones(features, device=device)
    values = {"hessian": eye, "cross": eye, "mean_abs": ones, "mean_square": ones, "max_abs": ones}
    return {**{name: values[name] for name in names if name != "tokens"}, "tokens": torch.tensor(0)}


def rescaled(statistics: Mapping[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
    """Return the statistics of the input multiplied by ``factor`` (K,), above zero."""
    both = factor[:, None] * factor
    factors = {"hessian": both, "cross": both, "mean_abs": factor, "mean_square": factor * factor, "max_abs": factor}
    return {name: value * factors[name] if name in factors else value for name, value in statistics.items()}

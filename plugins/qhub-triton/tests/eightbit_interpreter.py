"""Mends what triton's interpreter (3.6) gets wrong with 8-bit floats and with loop bounds; nothing on a GPU.

Its conversion to 8-bit floats loses the carry of a rounded mantissa and all subnormals; its scalars are arrays of one
element, which numpy 2.4 no longer takes for an integer.
"""

from __future__ import annotations

import os

import numpy as np
import torch

__all__ = ["mend"]

_FLOAT8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


def mend() -> None:
    """Replace both, once."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "_mended"):
        return
    interpreter._mended = True
    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def converted(value, source, target, rounding=None):
        to, of = _FLOAT8.get(str(target)), _FLOAT8.get(str(source))
        if to is not None and str(source) == "fp32":
            codes = torch.from_numpy(np.ascontiguousarray(value).view(np.float32)).to(to)
            return codes.view(torch.uint8).numpy().reshape(value.shape)
        if of is not None and str(target) in ("fp32", "fp16"):
            floats = torch.from_numpy(np.ascontiguousarray(value).view(np.uint8)).view(of).float().numpy()
            wide = floats.view(np.uint32) if str(target) == "fp32" else floats.astype(np.float16).view(np.uint16)
            return wide.reshape(value.shape)
        return convert(value, source, target, rounding)

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._convert_float, interpreter._patch_lang_tensor = converted, patched

"""Runs the kernels in triton's interpreter where there is no GPU (the repository's own conftest asks for it first)."""

import os


def _with_masks_of_bits() -> None:
    """Mend the interpreter of triton 3.9: a mask joined with a scalar comes out as int32, which loads refuse."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        original = getattr(InterpreterBuilder, name)

        def masked(self, *args, _original=original, _place=place, **kwargs):
            args[_place].data = args[_place].data.astype(bool)
            return _original(self, *args, **kwargs)

        setattr(InterpreterBuilder, name, masked)


if os.environ.get("TRITON_INTERPRET") == "1":
    _with_masks_of_bits()

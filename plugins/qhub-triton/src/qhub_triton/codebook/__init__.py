"""The kernels of this area."""

"""The layouts: how the numbers that methods choose are stored. One file a layout: fields and reference dequantize.

    Affine     w = scale * (q - zero)                1 to 8 bits
    Lookup     w = scale * table[q]                  1 to 8 bits
    Codebook   w = scale * sum_c codebook_c[code_c]  vectors of weights
    Float8     w = scale * float8                    E4M3, E5M2
    Blocks     rows of records as a file has them    scales and codes together: what a plugin's Record says
    Stacked    several of these on top of each other
    Tiled      Affine, Lookup or Float8              in the order that a GPU's kernels read

A layout is a description (frozen, hashable) and the tensors it names travel beside it as a dict.
"""

from qhub.layouts.activations import Activation
from qhub.layouts.affine import Affine
from qhub.layouts.base import GridPolicy, Layout, Parts, PartSpec, nbytes
from qhub.layouts.blocks import Blocks, Record
from qhub.layouts.codebook import Codebook
from qhub.layouts.float8 import Float8
from qhub.layouts.grid import Grid
from qhub.layouts.lookup import Lookup
from qhub.layouts.nested import Nested
from qhub.layouts.stacked import Stacked
from qhub.layouts.transforms import Transform

__all__ = [
    "Activation",
    "Affine",
    "Blocks",
    "Codebook",
    "Float8",
    "Grid",
    "GridPolicy",
    "Layout",
    "Lookup",
    "Nested",
    "PartSpec",
    "Parts",
    "Record",
    "Stacked",
    "Transform",
    "nbytes",
]

"""Products of weights in tiles for many rows of input on Hopper, each warp with a role of its own.

Written in Gluon, Triton's lower level, which has no interpreter and whose interface is not settled; where it is not to
be had, or gives something else than it should, the kernels of ``tiled/`` do the work.
"""

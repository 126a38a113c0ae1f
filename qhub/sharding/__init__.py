"""What FSDP2 (``torch.distributed.fsdp.fully_shard``) moves of a quantized weight: its bytes, cut evenly, never floats.

All codes and scales of a weight are seen as one run of bytes; each process keeps an equal piece of it, whatever the
layout, and an all-gather of the pieces is the weight again, its parts being views of the gathered bytes. Rows would not
do: the groups of many layouts (nested scales, 2-D blocks, act-order) have members on both sides of a cut. Tables that
the matrices of a batch, or many weights, share stay whole on every process.

The protocol is torch's own (``torch/distributed/fsdp/_fully_shard/_fsdp_param.py``): a parameter is cut by
``torch.chunk``, copied into ``new_zeros``, and the local tensor's ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather``
say what is sent and what is made of it.

recipe.py     a quantized weight as a run of bytes, and back
shard.py      what one process holds of it: a tensor that can be moved and gathered, and cannot compute
cutting.py    what torch's functions do to a weight that FSDP cuts
operators.py  what torch's operators do to a piece
"""

from qhub.sharding import cutting, operators
from qhub.sharding.recipe import Recipe
from qhub.sharding.shard import QuantizedShard

__all__ = ["QuantizedShard", "Recipe", "cutting", "operators"]

"""Fast decoding: plain ``generate`` on a static cache, in fused steps that are replayed as CUDA graphs.

``optimizing`` is the door; ``refusals`` says who does not come in; ``decoder`` keeps what lasts; ``loop`` is the
generation loop; ``steps`` one decode step; ``recipes`` and ``layers`` recognise parts of models by experiment;
``operations`` are the functions those parts are made of; ``joining`` stacks projections.
"""

from qhub.decoding.optimizing import optimize

__all__ = ["optimize"]

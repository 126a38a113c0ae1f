"""Fast decoding: plain ``generate`` on a static cache, in fused steps that are replayed as CUDA graphs.

``door`` stands in transformers' loop; ``optimizing`` says who may come in, ``survey`` and ``refusals`` who does not;
``decoder`` keeps what lasts between calls; ``calling`` is one call; ``loop`` the generation loop; ``steps`` one decode
step, ``graphs`` the same captured; ``recipes`` and ``layers`` recognise parts of models by experiment, for ``prompts``
too; ``operations`` are the functions those parts are made of; ``joining`` stacks projections.
"""

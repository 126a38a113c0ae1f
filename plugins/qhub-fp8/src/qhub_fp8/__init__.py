"""8- and 4-bit floats for qhub: the methods ``fp8``, ``mxfp8``, ``fbgemm_fp8``, ``inc``, ``mxfp4`` and ``nvfp4``.

Files::

    plugin.py      fp8: transformers' fine-grained FP8, DeepSeek's, and per-tensor dialects
    settings.py    what a FineGrainedFP8Config says, and the layout that follows
    config.py      which keys and values it may hold
    initialize.py  lets transformers' class keep them
    plan.py        the layout of each layer, and what is adopted from other methods
    rounding.py    the numbers of every float8 method: scales, codes, scales of inputs
    format.py      the checkpoint entries of fp8's dialects
    entries.py     what the formats of this package share
    mxfp8.py       mxfp8: fp8's files under another name
    fbgemm.py      fbgemm_fp8: rows under a scale each
    inc/           Intel Neural Compressor's vocabulary and workflow
    mxfp4.py       mxfp4: blocks and scales as gpt-oss files name them
    nvfp4.py       nvfp4: packed codes and scales as NVIDIA's ModelOpt names them
"""

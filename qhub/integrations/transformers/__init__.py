"""Joins transformers: registers a quantizer for every installed method, refuses methods that nobody serves.

register.py    the names in transformers' tables, and the two methods of its classes that are wrapped
quantizer.py   the one HfQuantizer that serves every plugin
weights.py     which weights a model has, and the layers that will hold them
checkpoint.py  headers of checkpoint files, checked before anything is read
routing.py     from file entries to quantized weights, through transformers' own conversions
saving.py      from quantized weights to file entries, written beside and renamed
"""

from qhub.integrations.transformers.register import install

__all__ = ["install"]

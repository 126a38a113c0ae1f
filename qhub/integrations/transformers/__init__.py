"""Joins transformers: registers a quantizer for every installed method, refuses methods that nobody serves.

register.py    the names in transformers' tables, and the two methods of its classes that are wrapped
quantizer.py   the one HfQuantizer that serves every plugin
weights.py     which weights a model has, and the layers that will hold them
checkpoint.py  headers of checkpoint files, checked before anything is read
routing.py     from file entries to quantized weights, through transformers' own conversions
folders.py     folders with a model: weight files, and what stands beside them
companions.py  configs in files of the methods' own tools
quantize.py    one call for every method and source
calibrating.py samples, and the engine run on a model of transformers
workshops.py   blocks brought in and results taken away, in memory or from folder to folder
streaming.py   from folder to folder, one block in memory
optimizers.py  which optimizer Trainer gets where the named one cannot run
writing.py     text that the model writes for its own calibration
saving.py      from quantized weights to file entries, written beside and renamed
"""

from qhub.integrations.transformers.register import install

__all__ = ["install"]

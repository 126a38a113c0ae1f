"""Joins PEFT: adapters merge into quantized weights, and out of them again, whatever the tuner.

register.py   wraps a few methods of PEFT's base classes, once, when PEFT is imported
dense.py      dense weights in the place of quantized ones, while PEFT works on them
starting.py   tuners that need a base layer's exact type, its gradient, or a copy that can be trained
layers.py     one tuner layer: merge and unmerge
models.py     a whole model: checks before anything is changed, the report after it
observing.py  what the layers take and what the model predicts, on a little text
merging.py    one call for what PEFT's own take no arguments for, for models and for folders
streaming.py  a merge into a dense checkpoint, one block in memory
loftq.py      LoRA's start at what quantizing lost
low_rank.py   the decomposition that LoftQ needs
"""

from qhub.integrations.peft.register import install, watch

__all__ = ["install", "watch"]

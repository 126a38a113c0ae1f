"""Writes an update (a merged adapter) into quantized weights, so that as little of it as possible is lost.

policy.py    what a method allows: its answer to the hook ``qhub_adapter``
options.py   what the caller asks for: which grid, how much text to measure on
rounding.py  one weight: candidates on the old grid and on new ones, the best by the error of the layer's output
feedback.py  codes one input feature after the other, each one's error made up for by the features to come
report.py    what was kept and what was lost, layer by layer and in the model's predictions
"""

from qhub.merging.options import MergeOptions, current_options, merging_with
from qhub.merging.policy import AdapterPolicy
from qhub.merging.report import MergedLayer, MergeReport

__all__ = ["AdapterPolicy", "MergeOptions", "MergeReport", "MergedLayer", "current_options", "merging_with"]

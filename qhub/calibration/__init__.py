"""One engine for every method that needs data: a model passes through block by block, and each layer's method gets
statistics of that layer's inputs.

Files::

    options.py      what a method asks of the engine
    data.py         samples from strings, files, datasets, or written by the model itself
    statistics.py   what can be known of a layer's inputs, as sums over tokens
    products.py     sees the products with a model's weights while it runs
    memory.py       products that later passes over a block need not repeat
    stacks.py       finds the blocks of a model, and what enters each of them
    activations.py  keeps what blocks return: on the device, in memory, on the disk
    folding.py      finds the operation before a layer, and moves input scales into it
    collecting.py   the statistics of one block's inputs
    equalizing.py   applies the input scales that a method chooses
    block.py        quantizes the weights of one block
    engine.py       the loop over blocks
    journal.py      what is finished, so that a killed run goes on
    sharing.py      several processes: sums over all of them
    report.py       errors and times, layer by layer

Knows neither methods nor hosts: a model is an ``nn.Module`` that can be called with a sample.
"""

from qhub.calibration.engine import Calibration
from qhub.calibration.options import CalibrationOptions
from qhub.calibration.report import CalibrationReport, LayerReport

__all__ = ["Calibration", "CalibrationOptions", "CalibrationReport", "LayerReport"]

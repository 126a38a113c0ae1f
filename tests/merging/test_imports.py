"""Whatever is imported first, PEFT's merges are qhub's on quantized weights, and nothing is said."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CHECK = """
from peft.tuners.tuners_utils import BaseTuner
from peft.tuners.lora import LoraLayer, Linear
from peft.tuners.vera.layer import Linear as Vera
import peft, peft.peft_model
wrapped = [(BaseTuner, "merge_and_unload"), (BaseTuner, "inject_adapter"), (Linear, "merge"), (Vera, "unmerge")]
wrapped += [(LoraLayer, "loftq_init")]
wrapped += [(module, "get_peft_model_state_dict") for module in (peft, peft.peft_model)]
for owner, name in wrapped:
    assert getattr(vars(owner)[name], "_qhub", False), (owner, name)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import peft",
        "import torch, peft",
        "import transformers, peft",
        "from peft import LoraConfig",
        "import qhub, peft",
    ],
)
def test_peft_is_joined_in_any_order(first: str) -> None:
    run = subprocess.run([sys.executable, "-c", first + _CHECK], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "qhub could not" not in run.stderr, run.stderr

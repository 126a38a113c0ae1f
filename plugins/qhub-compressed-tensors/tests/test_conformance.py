"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from pathlib import Path

from qhub.testing import MethodConformance

_DATA = Path(__file__).parent / "data"
_INT = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def _groups(weights: dict, inputs: dict | None = None, **others: object) -> dict:
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        **others,
    }


class TestCompressedTensors(MethodConformance):
    method = "compressed-tensors"
    configs = [
        {"config_groups": {"W8A8": ["Linear"]}},
        _groups({**_INT, "symmetric": False}),
        {"config_groups": {"FP8_BLOCK": ["re:.*mlp.*", "re:.*fc.*"], "NVFP4A16": ["Linear"]}},
        {"config_groups": {"FP8": ["Linear"]}},
    ]
    checkpoint = [_DATA / f"tiny-llama-{case}" for case in ("w4a16", "w4a16-asym", "nvfp4a16", "fp8-static", "mixed")]
    bad_configs = [
        {"config_groups": {"W5A5": ["Linear"]}},
        {"config_groups": {}},
        _groups({**_INT, "num_bits": 9}),
        _groups({**_INT, "group_size": 48}),
        _groups({**_INT, "symmetric": "yes"}),
        _groups({"num_bits": 5, "type": "float"}),
        _groups(_INT, {"num_bits": 8, "strategy": "channel"}),
        _groups(_INT, format="marlin-24"),
        _groups(_INT, ignore="lm_head"),
        _groups(_INT, ignore=["re:("]),
        _groups(_INT, sparsity_config={"format": "sparse-bitmask"}),
        _groups(_INT, transform_config={"config_groups": {"u": {}}}),
        _groups(_INT, quantization_status="melted"),
        _groups(_INT, kv_cache_scheme={"num_bits": "many"}),
    ]
    native_packages = ("compressed_tensors", "llmcompressor")

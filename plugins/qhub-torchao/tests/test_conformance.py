"""qhub's invariants, as every method has to keep them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qhub.testing import MethodConformance

DATA = Path(__file__).parent / "data"


class TestTorchAo(MethodConformance):
    method = "torchao"
    configs = [
        {"quant_type": "int4_weight_only", "group_size": 32},
        {"quant_type": "int8_dynamic_activation_int8_weight"},
        {"quant_type": "float8_dynamic_activation_float8_weight", "granularity": "PerRow"},
        {
            "quant_type": {
                "_type": "FqnToConfig",
                "_version": 1,
                "_data": {
                    "fqn_to_config": {
                        "re:.*(q_proj|fc1)": {
                            "_type": "IntxWeightOnlyConfig",
                            "_version": 2,
                            "_data": {
                                "weight_dtype": "int3",
                                "granularity": {"_type": "PerGroup", "_data": {"group_size": 64}},
                                "mapping_type": "ASYMMETRIC",
                            },
                        },
                        "re:.*k_proj": None,
                        "re:.*experts": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}},
                        "_default": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {"group_size": 64}},
                    }
                },
            }
        },
    ]
    bad_configs = [
        {"quant_type": "int5_weight_only"},
        {"quant_type": "int4_weight_only", "group_size": 48},
        {"quant_type": "int8_weight_only", "bits": 8},
        {"quant_type": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": "PerRow"}}},
        {"quant_type": {"_type": "UnknownConfig", "_version": 2, "_data": {}}},
    ]
    checkpoint = (DATA / "tiny-llama-intx4-g32", DATA / "tiny-llama-int8-dynamic")
    native_packages = ("torchao",)

    def _compare_values(self, values: Mapping[str, Any], config: Any) -> None:
        # A string becomes the config that it stands for; test_config.py says which.
        super()._compare_values({key: value for key, value in values.items() if key != "quant_type"}, config)

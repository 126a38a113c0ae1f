"""Checks that a config survives the way through ``config.json``, and that wrong ones are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest

from qhub.errors import ConfigError
from qhub.registry import registry
from qhub.testing.conformance.subject import KitBase
from qhub.testing.conformance.workbench import Workbench

__all__ = ["ConfigChecks"]


class ConfigChecks(KitBase):
    """Works on plain data and config objects; makes no model."""

    def test_config_round_trip(self, values: dict[str, Any], bench: Workbench) -> None:
        """values -> config -> JSON -> config: the same config, and the values given are in it."""
        given = copy.deepcopy(values)
        config = bench.parse(values)
        assert values == given, "parsing changed the values it was given"
        written = json.loads(json.dumps(config.to_dict()))
        assert written.get("quant_method") == self.method, f"to_dict() names the method {written.get('quant_method')!r}"
        again = bench.parse(written)
        assert type(again) is type(config)
        assert json.loads(json.dumps(again.to_dict())) == written, "to_dict() and from_dict() lose something"
        assert vars(again) == vars(config), f"to_dict() and from_dict() lose something: {vars(config)} -> {vars(again)}"
        self._compare_values(values, config)

    def _compare_values(self, values: Mapping[str, Any], config: Any) -> None:
        lost = {
            key: (value, getattr(config, key))
            for key, value in values.items()
            if isinstance(value, (int, float, str, bool))
            and getattr(config, key, value) != value
            # Some classes turn a name into what it names: "float16" into torch.float16.
            and str(getattr(config, key)).rpartition(".")[2] != str(value)
        }
        assert not lost, f"values that the config took and changed, {{key: (given, held)}}: {lost}"

    def test_json_text_is_the_config(self, values: dict[str, Any], bench: Workbench) -> None:
        """to_json_string(), which writes config.json's siblings, agrees with to_dict()."""
        config = bench.parse(values)
        text = json.loads(config.to_json_string(use_diff=False))
        assert text == json.loads(json.dumps(config.to_dict()))

    def test_unknown_key_is_refused(self, values: dict[str, Any], bench: Workbench) -> None:
        """A key of no meaning is a mistake in spelling, or a file of a newer version: never ignored."""
        with pytest.raises(ConfigError, match="qhub_unknown"):
            bench.parse({**values, "qhub_unknown": 1})

    def test_bad_config_is_refused(self, bad_config: dict[str, Any], bench: Workbench) -> None:
        """A value that the method does not offer is a ConfigError that names a key, at the latest when planning."""
        from qhub.integrations.transformers.weights import find_weights

        with pytest.raises(ConfigError) as caught:
            config = bench.parse(bad_config)
            model = bench.meta_model("llama")
            weights = [w for w in find_weights(model).values() if w.module != "lm_head"]
            registry.call(self.method, "qhub_plan", config=config, weights=weights, model_config=model.config)
            pytest.fail(f"{self.method} takes {bad_config}, which the class lists under bad_configs")
        message = str(caught.value)
        assert any(str(key) in message for key in bad_config), f"the error names none of {list(bad_config)}: {message}"

    def test_modules_can_be_left_out(self, config: int, bench: Workbench) -> None:
        """The list of modules to leave alone is obeyed, and the report says by which list."""
        spec = registry.call(self.method, "qhub_config")
        if spec.skip is None:
            pytest.skip(f"{self.method} has no list of modules to leave alone")
        if not self.can_quantize:
            pytest.skip(f"{self.method} does not quantize")
        from transformers import AutoModelForCausalLM

        parsed = bench.parse(bench.configs[config])
        setattr(parsed, spec.skip, [*(getattr(parsed, spec.skip) or []), "lm_head", "model.layers.1", "q_proj"])
        model: Any = AutoModelForCausalLM.from_pretrained(bench.dense("llama"), quantization_config=parsed)
        plan, skipped = model.hf_quantizer.plan, model.hf_quantizer.skipped
        wrong = [name for name in plan if name.startswith(("model.layers.1", "lm_head")) or "q_proj" in name]
        assert not wrong, f"quantized although listed in {spec.skip}: {wrong}"
        assert spec.skip in skipped["model.layers.0.self_attn.q_proj.weight"]

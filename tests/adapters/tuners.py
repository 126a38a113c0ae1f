"""The tuners of peft that change weights, each with a configuration for the tiny models."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
from typing import Any

import peft
import torch
from peft.tuners.lora import config as lora_config
from torch import nn

from qhub.testing.conformance.models import INPUT

from .cases import TARGETS, Case, noise, tuner_of

__all__ = ["LORA", "WEIGHT_TUNERS"]


def _case(name: str, cls: Any, *, targets: Any = TARGETS, options: dict[str, Any] | None = None, **values: Any) -> Case:
    def config(model: nn.Module) -> Any:
        chosen = list(targets) if isinstance(targets, list) else targets
        given = {} if chosen is None else {"target_modules": chosen}
        return cls(**given, **values)

    return Case(name, tuner_of(cls), config, **(options or {}))


# -- LoRA and its variants ---------------------------------------------------------------------------------------------


def _lora(name: str, *, options: dict[str, Any] | None = None, **values: Any) -> Case:
    return _case(name, peft.LoraConfig, options=options, **{"r": 4, "lora_alpha": 8, **values})


def _eva_data(model: nn.Module) -> None:
    batches = [{"input_ids": (INPUT + shift) % 128, "attention_mask": torch.ones_like(INPUT)} for shift in range(4)]
    peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def _corda_data(model: nn.Module, config: Any) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        for shift in range(32):
            model((INPUT + 3 * shift) % 128)

    preprocess_corda(model, config, run_model=run)


def _loraga_data(model: nn.Module, config: Any) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    preprocess_loraga(model, config, lambda: model(INPUT, labels=INPUT).loss.backward())


LORA = [
    _lora("LoRA"),
    _lora("LoRA, DoRA", use_dora=True),
    _lora("LoRA, rsLoRA", use_rslora=True),
    _lora("LoRA, PiSSA", init_lora_weights="pissa", options={"moves_base": True}),
    _lora("LoRA, PiSSA fast", init_lora_weights="pissa_niter_4", options={"moves_base": True}),
    _lora("LoRA, OLoRA", init_lora_weights="olora", options={"moves_base": True}),
    _lora(
        "LoRA, CorDA",
        init_lora_weights="corda",
        corda_config=lora_config.CordaConfig(corda_method="kpm", verbose=False),
        options={"moves_base": True, "prepare": _corda_data, "needs": "attr"},
    ),
    _lora("LoRA, EVA", init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), options={"finish": _eva_data}),
    _lora(
        "LoRA, LoRA-GA",
        # The gradients of so few tokens are of rank 8: twice as many vectors are cut out of them as the adapter has.
        r=2,
        init_lora_weights="lora_ga",
        lora_ga_config=lora_config.LoraGAConfig(),
        options={"moves_base": True, "prepare": _loraga_data},
    ),
    _lora("LoRA, MiCA", init_lora_weights="mica"),
    _lora("LoRA, orthogonal start", init_lora_weights="orthogonal"),
    _lora("LoRA, Gaussian start", init_lora_weights="gaussian"),
    _lora("LoRA, aLoRA", alora_invocation_tokens=[4, 5], task_type="CAUSAL_LM"),
    _lora("LoRA, biases of its own", lora_bias=True),
    _lora("LoRA, biases trained", bias="lora_only"),
    _lora("LoRA, ranks per layer", rank_pattern={"q_proj": 2, "down_proj": 6}, alpha_pattern={"q_proj": 3}),
    _lora("LoRA, layers repeated", layer_replication=[[0, 1], [0, 1]]),
    _lora("LoRA, KaSA", kasa_config=lora_config.KasaConfig(), options={"moves_base": True}),
    _lora("LoRA, VeLoRA", velora_config=lora_config.VeloraConfig(num_groups=4)),
    _lora(
        "LoRA, BD-LoRA",
        use_bdlora=lora_config.BdLoraConfig(
            target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["up_proj", "down_proj"], nblocks=2
        ),
    ),
    _lora("LoRA, QA-LoRA", use_qalora=True),
    _lora("LoRA, MonteCLoRA", monteclora_config=lora_config.MontecloraConfig(num_samples=2)),
]


def _without_cache(model: nn.Module, config: Any) -> None:
    model.config.use_cache = False


def _xlora(model: nn.Module) -> Any:
    """Save two LoRA adapters for ``model``, and mix them."""
    experts = {}
    for index in range(2):
        expert = peft.get_peft_model(copy.deepcopy(model), LORA[0].config(model))
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in expert.parameters():
                if parameter.requires_grad:
                    parameter.add_(noise(parameter, generator))
        folder = tempfile.mkdtemp(prefix="expert-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        expert.save_pretrained(folder)
        # peft asks for a name and then calls it by its number.
        experts[str(index)] = folder
    return peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=experts, xlora_dropout_p=0.0
    )


# -- the others --------------------------------------------------------------------------------------------------------

WEIGHT_TUNERS = [
    *LORA,
    _case("AdaLoRA", peft.AdaLoraConfig, init_r=6, target_r=4, total_step=10, tinit=1, tfinal=1),
    _case("AdaMSS", peft.AdamssConfig, r=16, num_subspaces=2, subspace_rank=2, options={"needs": "sklearn"}),
    _case("BEFT", peft.BeftConfig, targets=["v_proj"]),
    _case("BOFT", peft.BOFTConfig, boft_block_size=4),
    _case("C3A", peft.C3AConfig, block_size=16),
    _case("DEFT", peft.DeftConfig, r=4),
    _case("DeLoRA", peft.DeloraConfig, r=4),
    _case("FourierFT", peft.FourierFTConfig, n_frequency=64),
    _case("FRoD", peft.FrodConfig, progressbar=False),
    _case("GLoRA", peft.GloraConfig, r=4),
    _case("GraLoRA", peft.GraloraConfig, r=4, alpha=8),
    _case("HiRA", peft.HiraConfig, r=4),
    _case("HRA", peft.HRAConfig, r=4),
    _case("IA3", peft.IA3Config, feedforward_modules=["down_proj"]),
    _case("LILY", peft.LilyConfig, r=4),
    _case("LN tuning", peft.LNTuningConfig, targets=["input_layernorm", "post_attention_layernorm"]),
    _case("LoHa", peft.LoHaConfig, r=4),
    _case("LoKr", peft.LoKrConfig, r=4),
    _case("MiSS", peft.MissConfig, r=4),
    _case("MiSS, Bat", peft.MissConfig, r=4, init_weights="bat"),
    _case("MiSS, mini", peft.MissConfig, r=4, mini_r=2, init_weights="mini"),
    _case("OFT", peft.OFTConfig, oft_block_size=8),
    _case("OSF", peft.OSFConfig, effective_rank=8),
    _case("PEANuT", peft.PeanutConfig, r=4),
    _case(
        "Poly",
        peft.PolyConfig,
        r=4,
        n_tasks=2,
        n_skills=2,
        task_type="CAUSAL_LM",
        options={"inputs": {"input_ids": INPUT, "task_ids": torch.tensor([1])}},
    ),
    _case("PSOFT", peft.PsoftConfig, r=8),
    _case("PVeRA", peft.PveraConfig, r=8),
    _case("RandLoRA", peft.RandLoraConfig, r=8, randlora_alpha=16),
    _case("RoAd", peft.RoadConfig, variant="road_2", group_size=16),
    _case("SHADOW", peft.ShadowConfig, targets=None, r=4, shadow_num_hidden_layers=1, shadow_dropout=0.0),
    _case("SHiRA", peft.ShiraConfig, r=4, random_seed=1),
    _case("Supertuning", peft.SupertuningConfig, sparsity=0.9),
    _case("Supertuning, Supra", peft.SupertuningConfig, sparsity=0.9, r=4, lora_alpha=8),
    _case("TinyLoRA", peft.TinyLoraConfig, r=2, u=8),
    _case("Trainable tokens", peft.TrainableTokensConfig, targets=["embed_tokens"], token_indices=[2, 3, 5]),
    _case("Uni-LoRA", peft.UniLoraConfig, r=4, theta_d_length=64, init_theta_d_bound=0.5),
    _case("VB-LoRA", peft.VBLoRAConfig, r=4, num_vectors=16, vector_length=16),
    _case("VeRA", peft.VeraConfig, r=8),
    _case("WaveFT", peft.WaveFTConfig, n_frequency=64),
    Case("X-LoRA", "XLORA", _xlora, prepare=_without_cache),
]

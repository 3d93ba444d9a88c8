"""Checkpoints of ours in the format that other engines serve.

SDAR's format is Qwen3, SDAR-MoE's Qwen3-MoE, with other words in the config: SGLang and LMDeploy decode them,
block-causal, with logits at the token's own place, and with the mask id in their code. The keys that they read are
listed in docs/checkpoints.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from blockdiff.adapters import FILE as ADAPTER_FILE
from blockdiff.attention import UnsupportedModel
from blockdiff.families import family_of
from blockdiff.files import replace_directory
from blockdiff.model import BlockDiffusionModel

FORMATS = ("sdar",)
LAUNCH_FILE = "launch.yaml"
_TYPES = {"qwen3": ("sdar", "SDARForCausalLM"), "qwen3_moe": ("sdar_moe", "SDARMoeForCausalLM")}
# engines learn the config from this file where transformers does not know the model type; it holds no modeling code
_CONFIG_CODE = '''"""SDAR's config as engines read it: every key of config.json becomes an attribute."""

from transformers import PretrainedConfig, __version__


class SDARConfig(PretrainedConfig):
    model_type = "{model_type}"

    def __init__(self, rope_theta=10000.0, rope_scaling=None, rope_parameters=None, **keys):
        super().__init__(**keys)
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        # last: transformers 5 keeps rope_scaling under this name; under 4 LMDeploy reads on where it finds it
        if rope_parameters is not None and int(__version__.split(".")[0]) >= 5:
            self.rope_parameters = rope_parameters
'''


def export_sdar(model: BlockDiffusionModel, target: Path) -> list[Path]:
    """Write a checkpoint as SDAR's engines read it, LoRA merged; returns the files written.

    `launch.yaml` holds the block size for SGLang's --dllm-algorithm-config. The directory appears whole or not at all.
    Raises UnsupportedModel for a model that the format cannot hold, FileExistsError where something is at `target`.
    """
    _check_sdar(model)
    if target.exists():
        raise FileExistsError(f"{target}: something is there already; give another directory")
    size = model.spec.default_block_size
    with replace_directory(target) as staging:
        model.save_into(staging)
        config = sdar_config(json.loads((staging / "config.json").read_text()), model, size)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (staging / "configuration_sdar.py").write_text(_CONFIG_CODE.replace("{model_type}", config["model_type"]))
        (staging / LAUNCH_FILE).write_text(
            "# SGLang: --dllm-algorithm LowConfidence --dllm-algorithm-config THIS_FILE --trust-remote-code\n"
            f"# LMDeploy: dllm_block_length={size}\n" + yaml.safe_dump({"block_size": size})
        )
    return sorted(target.iterdir())


def sdar_notes(model: BlockDiffusionModel) -> list[str]:
    """What engines do with an SDAR checkpoint that this model's training did not show it."""
    layout, notes = model.spec.layout, []
    if layout.kind == "fixed" and getattr(layout, "offset", 0) != layout.largest_named - 1:
        notes.append(
            "engines count blocks from a document's first token, this checkpoint was trained to count from its second: "
            f"train with layout.offset={layout.largest_named - 1} for them"
        )
    notes.append("engines read prompts in blocks that see themselves whole, blockdiff token by token")
    notes.append(
        "training left the logit of [MASK] out and blockdiff never writes it; engines have it among all others, "
        "untrained, and may write it (docs/checkpoints.md)"
    )
    return notes


def sdar_config(config: dict[str, Any], model: BlockDiffusionModel, block_size: int) -> dict[str, Any]:
    """A Qwen3 config.json in SDAR's words: transformers 5 keeps the rotary base in `rope_parameters` alone, and engines
    that look for `rope_theta` beside it would go on with 10000; it calls `num_local_experts` what they call
    `num_experts`."""
    rope = config["rope_parameters"]
    model_type, architecture = _TYPES[config["model_type"]]
    if "num_local_experts" in config:
        config = {key: value for key, value in config.items() if key != "num_local_experts"}
        config["num_experts"] = model.backbone.config.num_local_experts
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    dtype = str(model.dtype).removeprefix("torch.")
    return config | {
        "model_type": model_type,
        "architectures": [architecture],
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "torch_dtype": dtype,
        "dtype": dtype,
        "pad_token_id": _pad_id(config, model),
        "mask_token_id": model.spec.mask_id,
        "block_size": block_size,
    }


def _check_sdar(model: BlockDiffusionModel) -> None:
    spec, config = model.spec, model.backbone.config
    family = family_of({"model_type": "sdar"})
    assert family is not None
    assert family.mask_id is not None
    retrain = "train with preset: sdar"
    wrong = ""
    if config.model_type not in _TYPES:
        wrong = f"its network is {config.model_type}, SDAR's is Qwen3: adapt a Qwen3 checkpoint"
    elif not spec.is_diffusion:
        wrong = f"it is a plain AR model: {retrain}"
    elif spec.alignment.prediction != "same":
        wrong = f"it predicts with {spec.alignment.prediction}ed logits, SDAR at the token's own place: {retrain}"
    elif spec.clean_context != "block_causal":
        wrong = f"its clean context is {spec.clean_context}, SDAR's is block_causal: {retrain}"
    elif model.adapter is not None and model.adapter.frozen:
        wrong = f"its {ADAPTER_FILE} acts on the noisy stream alone, engines have one network: use adapter kind: lora"
    elif spec.mask_id != family.mask_id.value:
        wrong = (
            f"its mask id is {spec.mask_id}, and engines have {family.mask_id.value} in their code: adapt a Qwen3 "
            "checkpoint with its own tokenizer, where that is the first free row"
        )
    elif any(window is not None for window in model.windows.values()):
        wrong = "some of its layers have a sliding window, which SDAR lacks: adapt a checkpoint without"
    elif config.hidden_act != "silu":
        wrong = f"its activation is {config.hidden_act}, and engines have silu in their code: adapt a checkpoint so"
    elif config.tie_word_embeddings and not _tied(model):
        wrong = (
            "its config.json says that head and embedding are one (tie_word_embeddings), but its weights hold two, and "
            "engines would take the embedding for both: set the key to false there"
        )
    elif config.model_type == "qwen3_moe":
        wrong = _unlike_moe(config)
    if wrong:
        raise UnsupportedModel(f"export to sdar: {wrong}")


def _tied(model: BlockDiffusionModel) -> bool:
    head, embedding = model.backbone.get_output_embeddings(), model.backbone.get_input_embeddings()
    return head.weight.data_ptr() == embedding.weight.data_ptr()


def _unlike_moe(config: Any) -> str:
    """Why SGLang would compute something else: it has experts in every layer and lets their shares sum to one."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "some of its layers have no experts, and engines expect them in all: adapt a checkpoint that has them"
    if not config.norm_topk_prob:
        return "its experts' shares do not sum to one (norm_topk_prob is false), SDAR-MoE's do: adapt a checkpoint so"
    return ""


def _pad_id(config: dict[str, Any], model: BlockDiffusionModel) -> int | None:
    """Padding's id: the config's, the tokenizer's, or the end of a document."""
    named = None if model.tokenizer is None else model.tokenizer.pad_token_id
    ids = [config.get("pad_token_id"), named, *model.end_ids[:1]]
    return next((int(found) for found in ids if found is not None), None)

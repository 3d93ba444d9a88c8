"""Released block diffusion models by family: what their config says of itself, what it leaves out, and who says so.

A config names an architecture; how the logits line up with the tokens, who sees whom and which token is [MASK] mostly
stand in the code beside it. This table holds those conventions, each with its source. What no source says is None,
which `blockdiff.foreign` refuses to guess. `docs/checkpoints.md` says what of it was checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockdiff import dit, llada2
from blockdiff.conversion import Conversion

# keys that transformers writes into any config, or that concern texts and not the network
BOOKKEEPING = {"architectures", "auto_map", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache"}
BOOKKEEPING |= {"_name_or_path", "_attn_implementation", "return_dict", "output_attentions", "output_hidden_states"}
BOOKKEEPING |= {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"}


@dataclass(frozen=True)
class Fact:
    """Something known of a checkpoint, and where from."""

    value: Any
    source: str


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    marks: keys of the config that only this family has, where the architecture's name alone does not tell. prediction
    `same` or `shift`; boundary (with `shift`) as in `objectives.Alignment`; clean_context as in `masks`, or `full`;
    block_key and mask_key: keys of the config that state the two; extra: further keys of the config that change nothing
    at inference; stated: those that must be there, since their readers' defaults differ. backbone: the model type of
    transformers whose class has the same arithmetic, and the same names but where there is a conversion. needs: what
    loading would take, where blockdiff does not load it. commands: those that run it all the same, by transformers' own
    `generate`. others: further conventions, of this family alone. note: what a user of a loaded one should know;
    unsized: and where its block size is taken for granted.
    """

    name: str
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    prediction: Fact | None = None
    boundary: Fact | None = None
    clean_context: Fact | None = None
    block_size: Fact | None = None
    mask_id: Fact | None = None
    block_key: str = "block_size"
    mask_key: str = "mask_token_id"
    extra: tuple[str, ...] = ()
    stated: tuple[str, ...] = ()
    backbone: str = ""
    conversion: Conversion | None = None
    needs: str = ""
    commands: tuple[str, ...] = ()
    reader: str = ""
    others: Mapping[str, Fact] = field(default_factory=dict)
    note: str = ""
    unsized: str = ""

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this family."""
        if self.marks:
            return all(key in config for key in self.marks)
        named = config.get("architectures") or ()
        return config.get("model_type") in self.model_types or any(name in self.architectures for name in named)

    def advice(self, sized: bool) -> str:
        """The note for a checkpoint that says its block size, or does not."""
        return self.note if sized or not self.unsized else f"{self.note}; {self.unsized}"


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a config.json, or None for one that the table does not know."""
    return next((family for family in FAMILIES if family.is_of(config)), None)


_SDAR_CODE = "JetAstra/SDAR, modeling_sdar.py and generate.py"
_SDAR_ENGINES = "SGLang srt/dllm/config.py, LMDeploy pytorch/configurations/sdar.py"
_A2D_CODE = "ZHZisZZ/dllm, dllm/pipelines/a2d"
_FAST = "Efficient-Large-Model/Fast_dLLM_v2_7B, modeling.py"
_GEMMA = "transformers, models/diffusion_gemma"
_LLADA2 = "inclusionAI/dFactory, models/llada2_moe"
_PROMPTS = "prompts are read token by token here, and blocks begin after the prompt; the original "
_GRID = _PROMPTS + "cuts prompt and answer into one grid of blocks (docs/checkpoints.md)"
_UNO = "another project (UNO) gives its causal verifier this architecture's name, which no config tells apart"
_COUNTED_BACK = _PROMPTS + "cuts it into blocks counted back from its end (docs/checkpoints.md)"
_BD3LM = "kuleshov-group/bd3lms, models/hf/modeling_bd3lm.py"


def _sdar(model_type: str, architecture: str, backbone: str, stated: tuple[str, ...] = ()) -> Family:
    return Family(
        "SDAR or TraDo (one format; the config does not say which)",
        (model_type,),
        (architecture,),
        prediction=Fact("same", _SDAR_CODE),
        clean_context=Fact("block_causal", _SDAR_CODE),
        block_size=Fact(4, "SGLang srt/dllm/config.py; releases named -b8 to -b64 use that size"),
        mask_id=Fact(151669, _SDAR_ENGINES),
        extra=("fuse_cross_entropy",),
        stated=stated,
        backbone=backbone,
        note=f"{_GRID}; {_UNO}",
        unsized="without block_size in config.json blocks of 4 are taken, and releases named -b8 to -b64 need theirs",
    )


def _a2d(backbone: str, architecture: str) -> Family:
    return Family(
        f"dllm A2D ({backbone})",
        (f"a2d-{backbone}",),
        (architecture,),
        prediction=Fact("same", _A2D_CODE),
        block_size=Fact(32, f"{_A2D_CODE} (recipe of Qwen3-0.6B-diffusion-bd3lm)"),
        backbone=backbone,
        note=_COUNTED_BACK,
    )


FAMILIES: tuple[Family, ...] = (
    _sdar("sdar", "SDARForCausalLM", "qwen3"),
    _sdar("sdar_moe", "SDARMoeForCausalLM", "qwen3_moe", ("norm_topk_prob",)),
    _a2d("qwen3", "A2DQwen3LMHeadModel"),
    _a2d("qwen2", "A2DQwen2LMHeadModel"),
    _a2d("llama", "A2DLlamaLMHeadModel"),
    Family(
        "Fast-dLLM v2",
        ("Fast_dLLM_Qwen",),
        ("Fast_dLLM_QwenForCausalLM",),
        prediction=Fact("shift", _FAST),
        boundary=Fact("noisy", _FAST),
        clean_context=Fact("block_causal", _FAST),
        block_size=Fact(32, "its paper, arXiv 2509.26328"),
        mask_id=Fact(151665, _FAST),
        block_key="bd_size",
        backbone="qwen2",
        note=_GRID + "; it decodes sub-blocks of 8",
    ),
    Family(
        "SDLM",
        marks=("text_mask_token_id",),
        prediction=Fact("shift", "OpenGVLab/SDLM, sdlm_inference.py"),
        boundary=Fact("seed", "OpenGVLab/SDLM, sdlm_inference.py"),
        clean_context=Fact("context_causal", "OpenGVLab/SDLM, sdlm_qwen2_5"),
        mask_key="text_mask_token_id",
        needs="a check of its Qwen2 code for switches that transformers' Qwen2 lacks",
    ),
    Family(
        "BD3-LM",
        ("bd3lm",),
        ("BD3LM",),
        prediction=Fact("same", _BD3LM),
        clean_context=Fact("block_causal", _BD3LM),
        mask_id=Fact(50257, "kuleshov-group/bd3lms (GPT-2's vocabulary and one row)"),
        backbone=dit.MODEL_TYPE,
        conversion=dit.CONVERSION,
        note=_GRID + "; its tokens are GPT-2's, whose tokenizer must lie beside the weights",
    ),
    Family(
        "LLaDA 2",
        ("llada2_moe",),
        ("LLaDA2MoeModelLM",),
        prediction=Fact("same", _LLADA2),
        clean_context=Fact("block_causal", _LLADA2),
        block_size=Fact(32, "SGLang srt/dllm/config.py"),
        mask_id=Fact(156895, "SGLang srt/dllm/config.py"),
        backbone="glm4_moe",
        conversion=llada2.CONVERSION,
        note=_GRID,
    ),
    Family(
        "LLaDA",
        architectures=("LLaDAModelLM",),
        prediction=Fact("same", "ML-GSAI/LLaDA"),
        clean_context=Fact("full", "ML-GSAI/LLaDA: one block over the whole text"),
        mask_id=Fact(126336, "ML-GSAI/LLaDA"),
        needs="its own transformer, which transformers has no class for, and decoding without a cache",
    ),
    Family(
        "Dream",
        ("Dream",),
        ("DreamModel",),
        prediction=Fact("shift", "NVlabs/Fast-dLLM, dream/model"),
        clean_context=Fact("full", "NVlabs/Fast-dLLM, dream/model: one block over the whole text"),
        mask_id=Fact(151666, "NVlabs/Fast-dLLM, dream/model"),
        needs="decoding of one block over the whole text with attention in both directions",
    ),
    Family(
        "NBDiff, openPangu-Diffusion",
        ("PanguEmbedded",),
        ("PanguEmbeddedForCausalLM",),
        prediction=Fact("shift", "yuchuantian/NBDiff, generation_utils.py"),
        clean_context=Fact("context_causal", "arXiv 2512.06776, appendix A"),
        block_size=Fact(32, "arXiv 2512.06776"),
        mask_id=Fact(45830, "yuchuantian/NBDiff, generation_utils.py"),
        needs="its own transformer (biases, rope 1.6e7), which transformers has no class for",
    ),
    Family(
        "DiffusionGemma",
        ("diffusion_gemma",),
        ("DiffusionGemmaForBlockDiffusion",),
        prediction=Fact("same", _GEMMA),
        clean_context=Fact("context_causal", _GEMMA),
        block_size=Fact(256, f"{_GEMMA} (canvas_length)"),
        block_key="canvas_length",
        needs="an engine of its own (encoder and decoder, self-conditioning, noise of random tokens): generate, "
        "eval tasks --data and eval generation run it through transformers' own generate(), in Python "
        "blockdiff.load_writer. "
        "No bound: the noise schedule and loss weights of its training are not in transformers",
        reader="DiffusionGemmaForBlockDiffusion",
        commands=("generate", "eval tasks --data", "eval generation"),
        others={
            "mask_id": Fact("none", _GEMMA),
            "noise": Fact("every token of the canvas drawn uniformly from the vocabulary", _GEMMA),
            "architecture": Fact(
                "a causal encoder writes keys and values, a decoder with its weights reads them", _GEMMA
            ),
            "conditioning": Fact(
                "the decoder is fed its last prediction, as a mean of embeddings; it has none at first", _GEMMA
            ),
            "images": Fact("its encoder reads them; blockdiff gives it text alone", _GEMMA),
        },
        note="no bound (its training's noise schedule and loss weights are not published with it), no serve, chat, "
        "train or export; one text at a time",
    ),
)

"""Checkpoints of other projects against networks of our own that follow each format's published semantics.

`parity.py` computes what a format says, from the format's own weight names and under a mask drawn here; blockdiff loads
the same directory. Three situations: a full prefix, a masked block over the cached prefix, and the commit of that block
with the next one over it. Twins: other block sizes, other alignments, and networks without one of their parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from parity import Network, Shape, State, in_blocks
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from blockdiff.attention import UnsupportedModel
from blockdiff.decode import named
from blockdiff.engine import Request, generate
from blockdiff.foreign import read_foreign
from blockdiff.inspecting import inspect
from blockdiff.layout import Layout, TokenMap
from blockdiff.loading import load
from blockdiff.model import BlockDiffusionModel, Past

IDS = torch.randint(3, 60, (16,), generator=torch.Generator().manual_seed(0))
DENSE = Shape()
MOE = replace(DENSE, experts=4)
LLADA2 = replace(DENSE, experts=8, rotary=4)


@dataclass(frozen=True)
class Format:
    """A released format at a tiny size. twins: networks that lack one of its parts, by the part."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    network: Callable[[State], Network]
    mask: int
    twins: dict[str, Callable[[State], Network]]
    shift: bool = False
    described: bool = False  # needs a block_diffusion.json
    first: int = 0  # tokens before the first whole block, where a grid is counted back from the prompt's end


def qwen_config(shape: Shape, vocabulary: int, name: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": name,
        "architectures": [architecture],
        "vocab_size": vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.pairs,
        "head_dim": shape.size,
        "intermediate_size": shape.inner,
        "rope_theta": shape.theta,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **more,
    }


def without(*parts: str) -> Callable[[Shape], Callable[[State], Network]]:
    """Networks that lack the weights whose names end so."""
    return lambda shape: lambda state: parity.qwen({n: t for n, t in state.items() if not n.endswith(parts)}, shape)


def of_qwen(shape: Shape, vocabulary: int, mask: int, config: dict[str, Any], **parts: Any) -> Format:
    options = {name: parts.pop(name) for name in ("norms", "biases", "tied") if name in parts}
    twins = {"rotary base": lambda state: parity.qwen(state, replace(shape, theta=1e4))}
    if "norms" in options:
        twins["norms"] = without("q_norm.weight", "k_norm.weight")(shape)
    if "biases" in options:
        twins["biases"] = without(".bias")(shape)
    if shape.experts:
        twins["second expert"] = lambda state: parity.qwen(state, replace(shape, chosen=1))
    for name in ("eps", "yarn", "activation"):
        usual = getattr(DENSE, name)
        if getattr(shape, name) != usual:
            twins[name] = lambda state, name=name, usual=usual: parity.qwen(state, replace(shape, **{name: usual}))
    shapes = parity.qwen_shapes(shape, vocabulary, **options)
    return Format(config, shapes, lambda state: parity.qwen(state, shape), mask, twins, **parts)


def formats() -> dict[str, Format]:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
    narrow = replace(DENSE, size=4, rotary=4)  # Qwen2's heads share the width
    found = {
        "sdar": of_qwen(
            DENSE, 151680, 151669, qwen_config(DENSE, 151680, "sdar", "SDARForCausalLM", block_size=4), norms=True
        ),
        "sdar_moe": of_qwen(
            MOE,
            151680,
            151669,
            qwen_config(MOE, 151680, "sdar_moe", "SDARMoeForCausalLM", block_size=4, **experts),
            norms=True,
        ),
        "fast_dllm": of_qwen(
            narrow,
            151680,
            151665,
            qwen_config(narrow, 151680, "Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", bd_size=4),
            biases="qkv",
            shift=True,
        ),
    }
    del found["fast_dllm"].config["head_dim"]
    for kind, options in (("qwen3", {"norms": True}), ("qwen2", {"biases": "qkv"}), ("llama", {})):
        shape = narrow if kind == "qwen2" else DENSE
        config = qwen_config(shape, 64, f"a2d-{kind}", "A2DLMHeadModel")
        if kind == "qwen2":
            del config["head_dim"]
        found[f"a2d_{kind}"] = of_qwen(shape, 64, 62, config, described=True, first=3, **options)
    return found | {"sdar_settings": of_settings(), "llada2": of_llada2(), "bd3lm": of_bd3lm()}


def of_settings() -> Format:
    """SDAR with every setting of Qwen3's config other than its default, as transformers 4 wrote it."""
    shape = replace(DENSE, eps=0.05, yarn=(4.0, 32), activation=F.gelu)
    settings = {"rms_norm_eps": 0.05, "attention_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}
    settings |= {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    settings |= {"max_position_embeddings": 128, "block_size": 4}
    config = qwen_config(shape, 151680, "sdar", "SDARForCausalLM") | settings
    return of_qwen(shape, 151680, 151669, config, norms=True, biases="qkvo", tied=True)


def of_llada2() -> Format:
    config = qwen_config(LLADA2, 156900, "llada2_moe", "LLaDA2MoeModelLM") | {
        "partial_rotary_factor": 0.5,
        "rotary_dim": 4,
        "num_experts": 8,
        "num_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "first_k_dense_replace": 1,
        "n_group": parity.GROUPS,
        "topk_group": parity.BEST_GROUPS,
        "routed_scaling_factor": parity.SCALE,
        "score_function": "sigmoid",
        "norm_topk_prob": True,
        "rope_scaling": None,
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "output_router_logits": False,
        "max_window_layers": 28,
        "pad_token_id": 156892,
        "eos_token_id": 156892,
    }
    config |= {f"{name}_dropout": 0.0 for name in ("attention", "embedding", "output")}
    off = "use_bias use_qkv_bias use_sliding_window norm_head norm_softmax using_split_qkv_in_self_attention"
    config |= dict.fromkeys(off.split(), False) | {"use_rmsnorm": True, "hidden_act": "silu"}

    def changed(part: str, factor: float) -> Callable[[State], Network]:
        return lambda state: parity.llada2({n: t * factor if part in n else t for n, t in state.items()}, LLADA2)

    twins = {
        "expert bias": changed("expert_bias", 0),
        "shared expert": changed("shared_experts.down", 0),
        "half rotary": lambda state: parity.llada2(state, replace(LLADA2, rotary=8)),
    }
    shapes = parity.llada2_shapes(LLADA2, 156900)
    return Format(config, shapes, lambda state: parity.llada2(state, LLADA2), 156895, twins)


def of_bd3lm() -> Format:
    config = {
        "model_type": "bd3lm",
        "architectures": ["BD3LM"],
        "auto_map": {"AutoConfig": "configuration_bd3lm.BD3LMConfig", "AutoModelForMaskedLM": "modeling_bd3lm.BD3LM"},
        "block_size": 4,
        "vocab_size": 50258,
        "model_length": 64,
        "cross_attn": True,
        "adaln": True,
        "causal": False,
        "attn_backend": "flex",
        "hidden_dim": DENSE.width,
        "cond_dim": parity.CONDITION,
        "n_blocks": DENSE.layers,
        "n_heads": DENSE.heads,
        "dropout": 0.1,
        "time_conditioning": False,
        "var_min": True,
        "sampling_eps_min": 0.001,
        "sampling_eps_max": 0.999,
        "torch_dtype": "float32",
    }

    def unmodulated(state: State) -> Network:
        return parity.dit({n: t * 0 if "adaLN" in n else t for n, t in state.items()}, DENSE)

    twins = {
        "noise level": lambda state: parity.dit(state, DENSE, noise_level=1.0),
        "adaptive norm": unmodulated,
        "head bias": lambda state: parity.dit({n: t * 0 if "linear.bias" in n else t for n, t in state.items()}, DENSE),
    }
    shapes = parity.dit_shapes(DENSE, 50258)
    return Format(config, shapes, lambda state: parity.dit(state, DENSE), 50257, twins)


FORMATS = formats()


def write(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """A directory of a format with random weights, and the weights."""
    form, state = FORMATS[name], parity.random_state(FORMATS[name].shapes)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(form.config))
    beside = {}
    if name == "bd3lm":  # buffers that its checkpoints hold, too
        beside = {"sampling_eps_min": torch.tensor(0.3), "backbone.rotary_emb.inv_freq": torch.ones(2)}
    save_file(state | beside, folder / "model.safetensors", {"format": "pt"})
    if form.described:
        described = {"format": 1, "mask_id": form.mask, "clean_context": "block_causal", "prediction": "same"}
        described |= {"boundary": "clean", "layout": {"kind": "fixed", "size": 4, "offset": 3}}
        described |= {"noise": {"kind": "bernoulli"}, "trained_length": 64, "ar_trained": False}
        (folder / "block_diffusion.json").write_text(json.dumps(described))
    return state


@dataclass(frozen=True)
class Opened:
    form: Format
    folder: Path
    state: dict[str, torch.Tensor]
    model: BlockDiffusionModel

    @property
    def network(self) -> Network:
        return self.form.network(self.state)


@pytest.fixture(scope="module", params=FORMATS)
def opened(request, tmp_path_factory) -> Opened:
    folder = tmp_path_factory.mktemp("parity") / request.param
    state = write(request.param, folder)
    double = {name: tensor.double() for name, tensor in state.items()}
    return Opened(FORMATS[request.param], folder, double, load(folder, dtype=torch.float64))


def away(got: torch.Tensor, expected: torch.Tensor, mask: int) -> float:
    """Largest difference, the [MASK] column (closed with us) left out."""
    real = torch.arange(got.shape[1]) != mask
    return float((got - expected)[:, real].abs().max())


@torch.no_grad()
def test_prefix_masked_block_and_commit(opened):
    model, network, form = opened.model, opened.network, opened.form
    mask, first = form.mask, form.first
    lengths = (first,) * (first > 0) + (4, 4, 4, 4)
    ids = IDS[: sum(lengths)] if not first else torch.cat([IDS, IDS[:first]])
    tokens = TokenMap.from_layouts([[Layout(0, lengths)]])
    whole = in_blocks(len(ids), 4, first)
    start, end = first + 8, first + 12

    clean = model(ids[None], tokens)
    expected = network(ids, whole)
    assert away(clean, expected, mask) < 1e-5  # a full prefix

    past = Past()
    model(ids[None, :start], tokens[:, :start], past=past, keep=True)
    masked = ids.clone()
    masked[start + 1 : end] = mask
    denoised = model(masked[None, start:end], tokens[:, start:end].as_noisy(), past=past)
    assert away(denoised, network(masked[:end], whole[:end, :end])[start:], mask) < 1e-5  # a masked block over it

    committed = model(ids[None, start:end], tokens[:, start:end], past=past, keep=True)
    assert away(committed, expected[start:end], mask) < 1e-5  # its commit
    masked = ids.clone()
    masked[end:] = mask
    after = model(masked[None, end:], tokens[:, end:].as_noisy(), past=past)
    assert away(after, network(masked, whole)[end:], mask) < 1e-5  # and the next block

    # twins: other blocks, a causal context, and every part of the network that could be missing
    for size in (1, 2):
        assert away(clean, network(ids, in_blocks(len(ids), size, first % size)), mask) > 1e-2
    assert away(denoised, network(masked[:end], whole[:end, :end])[start:], mask) > 1e-2
    assert model.context_length == form.config.get("max_position_embeddings", form.config.get("model_length"))
    for part, twin in form.twins.items():
        assert away(clean, twin(opened.state)(ids, whole), mask) > 1e-2, part


@torch.no_grad()
def test_greedy_texts_follow_the_alignment(opened, monkeypatch):
    """Which row predicts which token shows in a text: rows one off write another one."""
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"word": 0}, "word")))
    monkeypatch.setattr(opened.model, "tokenizer", words)
    form, prompt = opened.form, IDS[:5].tolist()
    request = Request(tuple(prompt), 12, 4, named("confidence + fixed(1)"))
    written = generate(opened.model, [request])[0].tokens
    assert written == parity.decode(opened.network, prompt, 3, 4, form.mask, shift=form.shift)
    assert written != parity.decode(opened.network, prompt, 3, 4, form.mask, shift=not form.shift)
    assert opened.model.spec.alignment.shift == form.shift


@torch.no_grad()
@pytest.mark.parametrize("opened", ["sdar_moe", "llada2", "bd3lm"], indirect=True)
def test_what_was_converted_can_be_saved(opened, tmp_path):
    """As a checkpoint of ours, from which the same numbers come, the head's bias among them."""
    assert inspect(opened.folder).loads
    tokens = TokenMap.from_layouts([[Layout(0, (4, 4, 4, 4))]])
    opened.model.save(tmp_path / "ours")
    again = load(tmp_path / "ours", dtype=torch.float64)
    assert again.spec == opened.model.spec
    assert away(again(IDS[None], tokens), opened.model(IDS[None], tokens), opened.form.mask) < 1e-9
    assert again.end_ids == opened.model.end_ids
    expected = {"bd3lm": (50256,), "llada2": (156892,)}  # GPT-2's end of text; the config's
    assert again.end_ids == expected.get(opened.folder.name, ())


@pytest.mark.parametrize("name", ["sdar", "llada2", "bd3lm"])
def test_texts_end_where_the_settings_of_generation_say(tmp_path, name):
    write(name, tmp_path / name)
    settings = tmp_path / name / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [11, 12], "pad_token_id": 3}))
    assert load(tmp_path / name).end_ids == (11, 12)
    for damaged, words in (("{", "no JSON"), ('{"eos_token_id": "end"}', "'end' are no tokens; correct it")):
        settings.write_text(damaged)
        with pytest.raises(UnsupportedModel, match=f"generation_config.json: .*{words}"):
            load(tmp_path / name)
        assert words in inspect(tmp_path / name).problem


def test_converted_weights_come_from_the_hub_too(tmp_path, monkeypatch):
    state = write("bd3lm", tmp_path / "copy")
    here = read_foreign(tmp_path / "copy")
    assert here is not None
    monkeypatch.setattr("blockdiff.foreign.snapshot_download", lambda name, allow_patterns: str(tmp_path / "copy"))
    named = replace(here, where="owner/model").weights()
    assert torch.equal(named["lm_head.bias"], state["backbone.output_layer.linear.bias"])
    assert set(named) == set(here.weights())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bd3lm", {"time_conditioning": True}, "time_conditioning: True; transformers has the parts for False alone"),
        ("bd3lm", {"cross_attn": False}, "cross_attn: False; transformers has the parts for True alone"),
        ("bd3lm", {"n_heads": None}, "config.json does not say n_heads; take a whole copy"),
        ("bd3lm", {"hidden_dim": "wide"}, "contradicts itself or is damaged: invalid literal"),
        ("bd3lm", {"n_blocks": 3}, r"weights are missing, among them backbone\.blocks\.2\.adaLN"),
        ("bd3lm", {"n_blocks": 1}, r"no place for, among them backbone\.blocks\.1\.adaLN"),
        ("bd3lm", {"hidden_dim": 32, "n_heads": 32}, "do not have the shapes that its config.json says"),
        ("llada2", {"num_hidden_layers": 3}, r"weights are missing, among them model\.layers\.2\."),
        ("llada2", {"num_key_value_heads": 4}, r"weights are missing, among them model\.layers\.0\.self_attn\.k_proj"),
        ("bd3lm", {"gating": "soft"}, "keys that blockdiff does not know for BD3-LM: gating"),
        (
            "llada2",
            {"score_function": "softmax"},
            "score_function: 'softmax'; transformers has the parts for 'sigmoid'",
        ),
        ("bd3lm", {"n_heads": 0}, "config.json: num_attention_heads would be 0; copy the checkpoint again"),
        (
            "bd3lm",
            {"block_size": 100000},
            "blocks of 100000 .config.json, block_size. are longer than its context of 64",
        ),
        ("llada2", {"num_key_value_heads": 0}, "config.json: num_key_value_heads would be 0"),
        ("llada2", {"rope_theta": "x"}, "rope_theta: 'x' is no base of rotary positions"),
        ("llada2", {"n_group": 3}, r"damaged: 8 experts in 3 groups \(n_group\)"),
        ("llada2", {"n_group": 0}, r"damaged: 8 experts in 0 groups \(n_group\)"),
        ("llada2", {"topk_group": 9}, r"damaged: the best 9 groups \(topk_group\) of 4"),
        ("llada2", {"topk_group": 0}, r"damaged: 2 experts for each token \(num_experts_per_tok\) of too few"),
        ("llada2", {"num_experts_per_tok": 9}, r"damaged: 9 experts for each token \(num_experts_per_tok\) of too few"),
        ("llada2", {"num_experts_per_tok": 0}, "config.json: num_experts_per_tok would be 0"),
        ("sdar_moe", {"num_experts_per_tok": 9}, "config.json: 9 experts for each token, and there are 4"),
        ("llada2", {"rotary_dim": 8}, "contradicts itself or is damaged: rotary_dim 8, and 4 by partial_rotary"),
    ],
)
def test_conversions_refuse_what_they_do_not_understand(tmp_path, name, changes, message):
    write(name, tmp_path / name)
    config = {key: value for key, value in {**FORMATS[name].config, **changes}.items() if value is not None}
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=message) as refused:
        load(tmp_path / name)
    assert "\n" not in str(refused.value)
    assert not inspect(tmp_path / name).loads

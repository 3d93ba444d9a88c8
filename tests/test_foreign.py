"""Checkpoints of other projects: what `inspect` says of them, which load, and the export to SDAR's format."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from conftest import full_disk
from safetensors.torch import load_file, save_file
from test_cli import run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from blockdiff import export
from blockdiff.adapters import Adapter
from blockdiff.attention import UnsupportedModel
from blockdiff.distributions import Fixed
from blockdiff.export import export_sdar, sdar_notes
from blockdiff.families import FAMILIES
from blockdiff.inspecting import inspect
from blockdiff.layout import Layout, TokenMap
from blockdiff.loading import attach, load, load_tokenizer
from blockdiff.model import Past, Spec
from blockdiff.objectives import Alignment

MASK = 151669
SMALL = {"vocab_size": 151680, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS = {"norm_topk_prob": True}
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
SDAR = Spec(
    mask_id=MASK,
    clean_context="block_causal",
    alignment=Alignment("same"),
    layout=Fixed(4, 3),
    trained_length=64,
    ar_trained=False,
)
IDS = torch.randint(3, 150000, (1, 12), generator=torch.Generator().manual_seed(0))


def rewrite(folder: Path, **changes: object) -> Path:
    """Change keys of config.json; None takes a key out."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def write(folder: Path, kind: str = "qwen3", **config: object) -> Path:
    """A tiny random model of transformers whose config.json is another project's, as transformers 4 wrote it."""
    tiny.backbone(kind, dtype=torch.float32, rope_parameters=ROPE, **SMALL).save_pretrained(folder)
    old = {"rope_parameters": None, "layer_types": None, "dtype": None, "torch_dtype": "float32", "rope_theta": 5e5}
    return rewrite(folder, **old, **config)


@pytest.fixture(scope="module")
def sdar(tmp_path_factory) -> Path:
    auto_map = {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}
    folder = tmp_path_factory.mktemp("foreign") / "sdar"
    return write(folder, model_type="sdar", architectures=["SDARForCausalLM"], auto_map=auto_map)


@pytest.fixture
def copy(sdar, tmp_path) -> Path:
    return Path(shutil.copytree(sdar, tmp_path / "copy"))


def block_causal(network, ids, size):
    """Logits of transformers' own model with a block-causal mask: what SDAR's attention is, in three lines."""
    block = torch.arange(ids.shape[1]) // size
    sees = block[:, None] >= block[None, :]
    return network(input_ids=ids, attention_mask=sees[None, None], use_cache=False).logits[0]


@torch.no_grad()
def test_sdar_directories_load_with_the_conventions_of_the_table(sdar):
    """Prefix, a masked block over it and its commit, each against code that knows SDAR's rule and none of ours."""
    model = load(sdar, dtype=torch.float64)
    spec = model.spec
    assert type(model.backbone).__name__ == "Qwen3ForCausalLM"
    assert (spec.mask_id, spec.clean_context, spec.alignment.prediction) == (MASK, "block_causal", "same")
    assert spec.default_block_size == 4
    for words in ("prompts are read token by token", "gives its causal verifier this architecture's name"):
        assert any(words in note for note in model.notes)
        assert words in inspect(sdar).note

    network = tiny.backbone("qwen3", rope_parameters=ROPE, **SMALL)
    network.load_state_dict({name: tensor.double() for name, tensor in load_file(sdar / "model.safetensors").items()})
    network.set_attn_implementation("sdpa")
    real = torch.arange(SMALL["vocab_size"]) != MASK
    tokens = TokenMap.from_layouts([[Layout(0, (4, 4, 4))]])
    clean = model(IDS, tokens)
    torch.testing.assert_close(clean[:, real], block_causal(network, IDS, 4)[:, real], atol=1e-5, rtol=1e-5)

    past = Past()
    model(IDS[:, :8], tokens[:, :8], past=past, keep=True)
    masked = IDS.clone()
    masked[0, 9:] = MASK
    denoised = model(masked[:, 8:], tokens[:, 8:].as_noisy(), past=past)
    expected = block_causal(network, masked, 4)[8:]
    torch.testing.assert_close(denoised[:, real], expected[:, real], atol=1e-5, rtol=1e-5)
    committed = model(IDS[:, 8:], tokens[:, 8:], past=past, keep=True)
    torch.testing.assert_close(committed, clean[8:], atol=1e-5, rtol=1e-5)

    # twins: another block size and a causal context give other logits
    for size in (1, 2):
        assert (block_causal(network, IDS, size) - clean)[:, real].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm_kind": "layer"}, "keys that blockdiff does not know for SDAR.*: qk_norm_kind; find out"),
        ({"mask_token_id": 7}, "config.json, mask_token_id says mask id 7, but it is 151669 according to SGLang"),
        ({"block_size": "four"}, "block_size: 'four' is no block size"),
        ({"rope_theta": None}, "has no rope_theta, and 10000 would be taken"),
        ({"rope_parameters": {**ROPE, "rope_theta": 1e4}}, "contradicts itself: rope_theta 500000.0, in rope_param"),
        (
            {"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}},
            r"contradicts itself: rope_theta 500000.0, in rope_scaling 10000.0; take out",
        ),
        ({"rope_theta": "1000000"}, "rope_theta: '1000000' is no base of rotary positions"),
        ({"rope_theta": [1]}, r"rope_theta: \[1\] is no base of rotary positions"),
        ({"rope_parameters": {**ROPE, "rope_theta": True}}, "rope_theta: True is no base of rotary positions"),
        ({"rope_parameters": [1]}, r"rotary positions: \[1\] is no object of settings"),
        ({"rope_scaling": "yarn"}, "rotary positions: 'yarn' is no object of settings"),
        (
            {"rope_parameters": ROPE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "contradicts itself: rope_scaling",
        ),
        ({"vocab_size": "many"}, "does not fit transformers' qwen3"),
        ({"vocab_size": 0}, "config.json: vocab_size would be 0; copy the checkpoint again"),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads would be 0"),
        ({"num_key_value_heads": 0}, "config.json: num_key_value_heads would be 0"),
        ({"max_position_embeddings": 0}, "config.json: max_position_embeddings would be 0"),
        ({"use_sliding_window": True, "sliding_window": 0}, "config.json: sliding_window would be 0"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types has sliding_attention, and no sliding window is in"),
        ({"hidden_act": "foo"}, r"cannot be read \('foo'\)"),
        ({"rope_scaling": {"rope_type": "foo"}}, r"cannot be read \('foo'\)"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "x"}}, "cannot be read"),
        ({"pad_token_id": 10**9}, "cannot be read"),
        ({"block_size": 65}, "blocks of 65 .config.json, block_size. are longer than its context of 64"),
    ],
)
def test_configs_that_are_not_understood_are_refused(copy, changes, message):
    rewrite(copy, **changes)
    with pytest.raises(UnsupportedModel, match=message) as refused:
        load(copy)
    assert "\n" not in str(refused.value)
    found = inspect(copy)
    assert not found.loads
    assert str(refused.value) == f"{copy}: {found.problem}"


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 1e6, "rope_parameters": {}, "rope_scaling": {"type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}},
        {"rope_theta": None, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_theta": 1000000, "rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_the_rotary_base_is_found_wherever_the_config_has_it(copy, changes):
    assert load(rewrite(copy, **changes)).backbone.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


def test_the_configs_block_size_stands_before_the_usual_one(copy):
    assert load(rewrite(copy, block_size=8)).spec.default_block_size == 8
    assert inspect(copy).conventions["block_size"].source == "config.json, block_size"


def test_other_weights_under_the_same_name_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    save_file({**weights, "model.relay.weight": torch.zeros(2)}, copy / "model.safetensors", {"format": "pt"})
    message = "weights that transformers' qwen3 has no place for, among them model.relay.weight"
    with pytest.raises(UnsupportedModel, match=message):
        load(copy)
    assert message in inspect(copy).problem
    weights.pop("model.layers.1.self_attn.q_norm.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"1 weights are missing, among them model\.layers\.1\."):
        load(copy)
    assert "1 weights are missing" in inspect(copy).problem


def test_a_description_beside_the_weights_must_agree(copy):
    described = SDAR.to_json() | {"clean_context": "context_causal"}
    (copy / "block_diffusion.json").write_text(json.dumps(described))
    with pytest.raises(UnsupportedModel, match="says clean_context context_causal, but it is block_causal according"):
        load(copy)
    (copy / "block_diffusion.json").write_text(json.dumps(SDAR.to_json()))
    assert load(copy).spec == SDAR
    with pytest.raises(UnsupportedModel, match="says blocks of 4, but they are 8 according to config"):
        load(rewrite(copy, block_size=8))


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_a2d_configs_do_not_say_who_sees_whom(tmp_path, kind):
    """Trained as BD3-LM or as MDLM, the config is the same: the user says which, in block_diffusion.json."""
    folder = write(tmp_path / "a2d", kind, model_type=f"a2d-{kind}", architectures=["A2D"])
    with pytest.raises(UnsupportedModel, match=r"says its clean_context, mask_id \(dllm A2D"):
        load(folder)
    assert "clean_context" not in inspect(folder).conventions
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    (folder / "block_diffusion.json").write_text(re.search(r"```json\n(.*?)```", page, re.S)[1])
    spec = load(folder).spec
    assert (spec.mask_id, spec.clean_context, spec.default_block_size) == (MASK, "block_causal", 32)
    assert spec.layout == Fixed(32, 31)


def test_fast_dllm_loads_as_shifted_qwen2(tmp_path):
    names = {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"], "bd_size": 16}
    folder = write(tmp_path / "fast", "qwen2", **names)
    spec = load(folder).spec
    assert (spec.mask_id, spec.alignment, spec.layout) == (151665, Alignment("shift", "noisy"), Fixed(16, 15))
    assert "blocks of 8" in inspect(folder).note


def test_a_mask_id_must_have_a_row(tmp_path):
    tiny.backbone("qwen3", dtype=torch.float32, rope_parameters=ROPE).save_pretrained(tmp_path / "small")
    folder = rewrite(tmp_path / "small", model_type="sdar", architectures=["SDARForCausalLM"])
    message = "mask id 151669 lies beyond the model's 37 embedding rows"
    with pytest.raises(UnsupportedModel, match=message):
        load(folder)
    assert message in inspect(folder).problem


def test_the_weights_of_ar_models_are_compared_too(tmp_path):
    folder = write(tmp_path / "plain", "llama")
    whole = load_file(folder / "model.safetensors")
    changed = {
        "1 weights are missing, among them model.norm.weight": {
            n: w for n, w in whole.items() if n != "model.norm.weight"
        },
        r"\[7\], and \[8\] by its config.json": {**whole, "model.norm.weight": torch.ones(7)},
    }
    for message, weights in changed.items():
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UnsupportedModel):
            load(folder)
        assert re.search(message, inspect(folder).problem)
    save_file({**whole, "model.extra.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    note = "weights that its class in transformers has no place for are left out, among them model.extra.weight"
    assert note in load(folder).notes
    assert (inspect(folder).loads, inspect(folder).note) == (True, note)


def test_mixtures_of_experts_load_too(tmp_path):
    folder = write(tmp_path / "moe", "qwen3_moe", model_type="sdar_moe", num_local_experts=None, num_experts=4)
    assert type(load(folder).backbone).__name__ == "Qwen3MoeForCausalLM"
    assert inspect(folder).loads
    said = "config.json does not say norm_topk_prob, and those who read it take different values"
    with pytest.raises(UnsupportedModel, match=said):
        load(rewrite(folder, norm_topk_prob=None))
    rewrite(folder, norm_topk_prob=True)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("experts.3.up_proj.weight"))
    bent = {**weights, name: weights[name][:-1].contiguous()}
    for changed, words in (
        ({n: w for n, w in weights.items() if n != name}, f"among them {name}"),
        (bent, f"{name} is"),
    ):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        found = inspect(folder)
        assert not found.loads
        assert words in found.problem


@pytest.mark.parametrize(("version", "seen"), [("4.57.3", False), ("5.20.0", True)])
def test_the_exported_config_code_leaves_rope_where_each_transformers_looks(monkeypatch, version, seen):
    """LMDeploy takes `rope_parameters` where the config has it, and then wants a `rope_scaling` that transformers 4 has
    not made of it."""
    monkeypatch.setattr(transformers, "__version__", version)
    names: dict = {}
    exec(export._CONFIG_CODE.replace("{model_type}", "sdar"), names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of rope_scaling, by the transformers that is really here
        config = names["SDARConfig"](rope_theta=1e6, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    assert config.rope_theta == 1e6
    assert bool(vars(config).get("rope_parameters")) == seen


@pytest.mark.parametrize(
    ("config", "family", "needed"),
    [
        ({"architectures": ["LLaDAModelLM"], "model_type": "llada"}, "LLaDA", "its own transformer"),
        ({"architectures": ["DreamModel"], "model_type": "Dream"}, "Dream", "in both directions"),
        ({"model_type": "qwen2", "text_mask_token_id": 5, "block_size": 4}, "SDLM", "a check of its Qwen2 code"),
        ({"model_type": "PanguEmbedded"}, "NBDiff, openPangu-Diffusion", "its own transformer"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_what_it_would_take(tmp_path, config, family, needed):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert (found.family, found.loads, found.weights.parameters) == (family, False, 6)
    with pytest.raises(UnsupportedModel, match=f"{family} is not loaded; it would need .*{needed}"):
        load(tmp_path)


def conventions_of_the_page() -> dict[str, list[str]]:
    """Rows of the table of families: every name and model type -> its cells."""
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    lines = page.partition("| family | `model_type` |")[2].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: row for row in rows for name in (row[0], *re.findall(r"`([^`]+)`", row[1]))}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_page_says_what_the_table_of_families_says(family):
    rows = conventions_of_the_page()
    _, _, read_by, prediction, clean, block, mask, loads = rows[(*family.model_types, family.name)[0]]
    boundary = [] if family.boundary is None else [family.boundary.value]
    assert prediction.split(", ") == [family.prediction.value, *boundary]
    stated = family.clean_context.value.replace("_", "-") if family.clean_context is not None else "not in the config"
    assert clean.startswith(stated)
    assert clean == stated or family.clean_context is None
    usual = "config" if family.block_size is None else f"config, else {family.block_size.value}"
    assert block == ("" if stated == "full" else usual)
    unsaid = "none" if family.others else "config" if family.marks else "tokenizer's"
    assert mask == (unsaid if family.mask_id is None else str(family.mask_id.value))
    assert loads.startswith("for" if family.commands else "no" if family.needs else ("yes", "with"))
    assert (loads == "yes") == (not family.needs and family.clean_context is not None)
    if loads == "yes":
        reader = "gpt_neox" if family.conversion is not None and family.name == "BD3-LM" else family.backbone
        assert f"`{reader}`" in read_by


def test_inspect_tells_ours_from_ar_models_and_from_the_unknown(trained, tmp_path, capsys):
    code, out, _ = run("inspect", trained / "checkpoint", "--json", tmp_path / "seen.json", capsys=capsys)
    assert code == 0
    assert "a block diffusion model of blockdiff" in out
    seen = json.loads((tmp_path / "seen.json").read_text())
    described = json.loads((trained / "checkpoint" / "block_diffusion.json").read_text())
    assert seen["conventions"]["mask_id"] == {"value": described["mask_id"], "source": "block_diffusion.json"}
    assert {"command", "seed", "versions"} <= set(seen)
    assert seen["loads"]
    state = load_file(trained / "checkpoint" / "model.safetensors")
    assert seen["weights"]["parameters"] == sum(tensor.numel() for tensor in state.values())

    plain = Path(shutil.copytree(trained / "checkpoint", tmp_path / "plain"))
    (plain / "block_diffusion.json").unlink()
    assert "an AR model" in inspect(plain).family
    found = inspect(rewrite(plain, model_type="brand_new", architectures=["BrandNew"]))
    assert (found.family, found.conventions, found.loads) == ("unknown", {}, False)
    assert "'brand_new' is no decoder of transformers" in str(found)
    assert run("inspect", tmp_path / "nothing", capsys=capsys)[0] == 2


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("qwen3", {"architectures": ["MyDiffusionLM"]}, "architecture MyDiffusionLM, and transformers' qwen3 is Qwen3"),
        ("qwen3", {"architectures": None, "auto_map": {"AutoModelForCausalLM": "own.MyLM"}}, "architecture MyLM, and"),
        ("qwen3", {"mask_token_id": 7, "block_size": 32}, "mask_token_id 7, block_size 32, and transformers' qwen3"),
        ("llama", {"bd_size": 8}, "bd_size 8, and transformers' llama"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architecture LlamaForSequenceClassification"),
    ],
)
def test_what_is_more_than_transformers_decoder_is_no_ar_model(tmp_path, kind, config, said):
    folder = write(tmp_path / "copy", kind, **config)
    with pytest.raises(UnsupportedModel, match=f"its config has {said}.*prediction, clean context.* would be needed"):
        load(folder)
    found = inspect(folder)
    assert (found.family, found.loads, found.conventions) == ("unknown", False, {})
    assert said in found.problem
    (folder / "block_diffusion.json").write_text(json.dumps(SDAR.to_json()))  # its user knows
    assert inspect(folder).loads
    assert load(folder).spec == SDAR


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": None},
        {"architectures": ["LLaMAForCausalLM"]},  # as the first conversions had it
        {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}, "mask_token_id": None},
    ],
)
def test_ar_models_of_transformers_load(tmp_path, config):
    folder = write(tmp_path / "plain", "llama", **config)
    assert "an AR model" in inspect(folder).family
    assert load(folder).spec.default_block_size == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "32"}, "expected int, got str"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "cannot be read"),
        ({"dtype": []}, "cannot be read"),
    ],
)
def test_inspect_says_what_is_wrong_with_a_config(trained, tmp_path, capsys, changes, message):
    folder = rewrite(Path(shutil.copytree(trained / "checkpoint", tmp_path / "copy")), **changes)
    found = inspect(folder)
    assert not found.loads
    assert message in found.problem
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        load(folder)
    for damaged in ({"model_type": {}}, {"architectures": True}, {"architectures": [1]}):
        code, _, error = run("inspect", rewrite(folder, **damaged), capsys=capsys)
        assert (code, error.count("\n")) == (2, 1)
        assert "copy the checkpoint again" in error
        rewrite(folder, model_type="llama", architectures=["LlamaForCausalLM"])


def test_only_where_no_block_size_is_stated_one_is_taken_for_granted(copy):
    assert "blocks of 4 are taken" in inspect(copy).note
    assert any("blocks of 4 are taken" in note for note in load(copy).notes)
    rewrite(copy, block_size=8)
    assert inspect(copy).note
    assert "blocks of 4" not in inspect(copy).note
    assert not any("blocks of 4 are taken" in note for note in load(copy).notes)


def exportable(kind: str = "qwen3", network: dict[str, object] | None = None, **changes: object):
    settings = {**SMALL, **(EXPERTS if kind == "qwen3_moe" else {}), **(network or {})}
    model = attach(tiny.backbone(kind, dtype=torch.float32, rope_parameters=ROPE, **settings), spec=SDAR)
    model.spec = Spec(**{**vars(SDAR), **changes})
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_the_export_loads_back_to_the_same_bits(tmp_path, kind):
    model = exportable(kind)
    export_sdar(model, tmp_path / "out")
    tokens = TokenMap.from_layouts([[Layout(2, (4, 4, 2))]])
    assert load(tmp_path / "out").spec == SDAR
    (tmp_path / "out" / "block_diffusion.json").unlink()  # as an engine's user would get it: by the table alone
    again = load(tmp_path / "out")
    assert (again.spec.mask_id, again.spec.clean_context, again.spec.layout) == (MASK, "block_causal", Fixed(4, 3))
    for stream in (tokens, tokens.as_noisy()):
        assert torch.equal(again(IDS, stream), model(IDS, stream))

    # the twin: another rotary base, which the weights do not tell
    rewrite(tmp_path / "out", rope_theta=1e4, rope_parameters=None)
    assert not torch.equal(load(tmp_path / "out")(IDS, tokens), model(IDS, tokens))


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")  # engines read it by that name
def test_engines_find_every_key_they_read(tmp_path):
    """As they read it: through the config's own file, attributes of the top level, with the engines' defaults."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 500000.0}
    for name, rope in (("plain", ROPE), ("yarn", yarn)):
        model = exportable()
        model.backbone.config.rope_parameters = rope
        model.backbone.config.pad_token_id = None
        export_sdar(model, tmp_path / name)
        config = AutoConfig.from_pretrained(tmp_path / name, trust_remote_code=True)  # the file we have just written
        assert config.architectures == ["SDARForCausalLM"]
        assert (config.model_type, config.mask_token_id, config.pad_token_id) == ("sdar", MASK, 2)
        assert config.rope_theta == 500000.0
        assert config.rope_parameters == rope
        named = "attention_bias sliding_window head_dim rms_norm_eps tie_word_embeddings bos_token_id eos_token_id"
        for key in named.split():
            assert hasattr(config, key)
        stated = json.loads((tmp_path / name / "config.json").read_text())
        assert stated["torch_dtype"] == "float32"
        expected = {key: value for key, value in yarn.items() if key != "rope_theta"} if name == "yarn" else None
        assert stated["rope_scaling"] == expected
        assert "block_size: 4" in (tmp_path / name / "launch.yaml").read_text()
    # the twin: what transformers 5 writes by itself
    exportable().save(tmp_path / "ours")
    assert "rope_theta" not in json.loads((tmp_path / "ours" / "config.json").read_text())


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_engines_find_the_experts_they_read(tmp_path):
    """LMDeploy and SGLang look for every expert by its own name, and for `num_experts`, which transformers 5 calls
    otherwise."""
    exportable("qwen3_moe").save(tmp_path / "ours")
    assert "num_experts" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    export_sdar(exportable("qwen3_moe"), tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (config.model_type, config.architectures) == ("sdar_moe", ["SDARMoeForCausalLM"])
    read = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    read |= {"mlp_only_layers": [], "decoder_sparse_step": 1, "rope_theta": 500000.0}
    assert {key: getattr(config, key) for key in read} == read
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp."
        wanted = {f"{mlp}experts.{e}.{name}_proj.weight" for e in range(4) for name in ("gate", "up", "down")}
        assert {name for name in weights if name.startswith(mlp)} == wanted | {f"{mlp}gate.weight"}
    assert weights["model.layers.0.mlp.experts.3.up_proj.weight"].shape == (32, SMALL["hidden_size"])


@pytest.mark.parametrize(
    ("kind", "network", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, "some of its layers have no experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "some of its layers have no experts"),
        ("qwen3_moe", {"norm_topk_prob": False}, "its experts' shares do not sum to one"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "have a sliding window"),
    ],
)
def test_networks_that_engines_would_compute_otherwise_are_refused(tmp_path, kind, network, message):
    with pytest.raises(UnsupportedModel, match=message):
        export_sdar(exportable(kind, network), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_lora_is_merged_into_the_export(tmp_path):
    pytest.importorskip("peft")
    model, tokens = exportable(), TokenMap.from_layouts([[Layout(2, (4, 4, 2))]])
    before = model(IDS, tokens)
    model.attach_adapter(Adapter("lora", rank=2))
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    adapted = model(IDS, tokens)
    export_sdar(model, tmp_path / "out")
    again = load(tmp_path / "out")(IDS, tokens)
    real = torch.arange(SMALL["vocab_size"]) != MASK
    torch.testing.assert_close(again[:, real], adapted[:, real], atol=1e-4, rtol=1e-4)
    assert (again - before)[:, real].abs().max() > 1e-2
    frozen = exportable()
    frozen.attach_adapter(Adapter("noisy", rank=2))
    with pytest.raises(UnsupportedModel, match="acts on the noisy stream alone"):
        export_sdar(frozen, tmp_path / "frozen")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": Alignment("shift")}, "predicts with shifted logits, SDAR at the token's own place: train with"),
        ({"clean_context": "context_causal"}, "clean context is context_causal, SDAR's is block_causal: train with"),
        ({"mask_id": 37}, "its mask id is 37, and engines have 151669 in their code"),
        ({"mask_id": None}, "it is a plain AR model: train with preset: sdar"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        export_sdar(exportable(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_writes_all_or_nothing_and_over_nothing(sdar, trained, tmp_path, capsys, monkeypatch):
    code, _, error = run("export", trained / "checkpoint", tmp_path / "out", "--format", "sdar", capsys=capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "its network is llama, SDAR's is Qwen3: adapt a Qwen3 checkpoint" in error
    assert run("export", sdar, tmp_path / "out", "--format", "gguf", capsys=capsys)[0] == 2
    assert not list(tmp_path.iterdir())

    code, out, error = run("export", sdar, tmp_path / "out", capsys=capsys)
    assert code == 0
    assert f"written: {tmp_path / 'out' / 'launch.yaml'}" in out
    assert "engines read prompts in blocks" in error
    before = (tmp_path / "out" / "config.json").read_bytes()
    code, _, error = run("export", sdar, tmp_path / "out", capsys=capsys)
    assert (code, "something is there already" in error) == (2, True)
    assert (tmp_path / "out" / "config.json").read_bytes() == before

    with full_disk():
        code, _, error = run("export", sdar, tmp_path / "second", capsys=capsys)
    assert code == 1
    said = error.splitlines()[-1]  # after the checkpoint's notes
    assert said.startswith(f"blockdiff: {tmp_path / 'second'}: Error while serializing: I/O error: File too large")
    assert said.endswith("; make room")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr("blockdiff.export.sdar_config", lambda *given: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_sdar(exportable(), tmp_path / "second")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")  # engines read it by that name
@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_whole(trained, tmp_path, tied):
    """Tokenizer, chat template, end tokens, dtype and block size as the model has them; a tied head is written once."""
    network = {"tie_word_embeddings": tied, "eos_token_id": [2, 7]}
    backbone = tiny.backbone("qwen3", dtype=torch.bfloat16, rope_parameters=ROPE, **SMALL, **network)
    tokenizer = load_tokenizer(trained / "checkpoint")
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = attach(backbone, tokenizer, spec=Spec(**{**vars(SDAR), "layout": Fixed(8, 7)}))
    export_sdar(model, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"], config["block_size"]) == ("bfloat16", "bfloat16", 8)
    assert (config["tie_word_embeddings"], config["eos_token_id"]) == (tied, [2, 7])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    launch = (tmp_path / "out" / "launch.yaml").read_text()
    assert yaml.safe_load(launch) == {"block_size": 8}
    assert "dllm_block_length=8" in launch
    read = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)  # the file we have just written
    assert read("the cat sat").input_ids == tokenizer("the cat sat").input_ids
    assert read.chat_template == tokenizer.chat_template
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in weights) != tied
    tokens = TokenMap.from_layouts([[Layout(1, (7, 4))]])
    assert torch.equal(load(tmp_path / "out")(IDS, tokens.as_noisy()), model(IDS, tokens.as_noisy()))


@torch.no_grad()
def test_a_tied_head_stays_tied_through_lora(tmp_path):
    pytest.importorskip("peft")
    model = exportable(network={"tie_word_embeddings": True})
    model.attach_adapter(Adapter("lora", rank=2))
    model.adapter.mask_row.add_(1.0)
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    tokens = TokenMap.from_layouts([[Layout(2, (4, 4, 2))]]).as_noisy()
    adapted = model(IDS, tokens)
    export_sdar(model, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in weights
    assert torch.equal(weights["model.embed_tokens.weight"][MASK], model.adapter.mask_row)
    real = torch.arange(SMALL["vocab_size"]) != MASK
    torch.testing.assert_close(load(tmp_path / "out")(IDS, tokens)[:, real], adapted[:, real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu, and engines have silu in their code"),
        (
            {"tie_word_embeddings": True},
            r"are one \(tie_word_embeddings\), but its weights hold two",
        ),
    ],
)
def test_what_engines_do_not_read_is_refused(tmp_path, network, message):
    model = exportable(network=network)
    if "tie_word_embeddings" in network:  # as transformers 5.23 loads a file that holds both
        model.backbone.lm_head.weight = torch.nn.Parameter(model.backbone.lm_head.weight + 1)
    with pytest.raises(UnsupportedModel, match=message):
        export_sdar(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_the_mask_is_a_word_like_any_other_to_engines(tmp_path):
    """The raw logits over the whole vocabulary: an engine has all of them, blockdiff closes one and no other."""
    model = exportable()
    export_sdar(model, tmp_path / "out")
    tokens = TokenMap.from_layouts([[Layout(0, (4, 4, 4))]])
    ours = model(IDS, tokens)
    rewrite(tmp_path / "out", model_type="qwen3", architectures=["Qwen3ForCausalLM"], auto_map=None)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    theirs = block_causal(network, IDS, 4)
    real = torch.arange(SMALL["vocab_size"]) != MASK
    torch.testing.assert_close(theirs[:, real], ours[:, real], atol=1e-5, rtol=1e-5)
    assert theirs[:, MASK].isfinite().all()
    assert (ours[:, MASK] == -torch.inf).all()
    assert any("[MASK]" in note and "untrained" in note for note in sdar_notes(model))

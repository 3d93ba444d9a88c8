"""The bridge: every architecture, the probe, the [MASK] row, saving and loading."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from blockdiff import probe
from blockdiff.attention import UnsupportedModel
from blockdiff.distributions import ScaleMixture
from blockdiff.layout import Layout, TokenMap
from blockdiff.loading import attach, load
from blockdiff.masks import Visibility
from blockdiff.model import Past, Spec
from blockdiff.noise import ExactCount
from blockdiff.objectives import Alignment, block_numbers, maskable, score, token_losses, two_streams
from blockdiff.probe import _distance as distance
from blockdiff.tokenizer import train_tokenizer


def score_batch(model, ids, tokens, corruption):
    stream = two_streams(ids, tokens, corruption, model.spec.alignment, model.spec.mask_id)
    losses = token_losses(model(stream.ids, stream.tokens, read=stream.reads.index), stream.reads)
    return score(losses, stream.reads, tokens, int(tokens.doc.max()) + 1)


@pytest.mark.parametrize("kind", tiny.SUPPORTED)
@torch.no_grad()
def test_the_identities_hold_on_every_architecture(kind):
    """Accepted by the probe; the clean stream is the untouched model, its window kept; one pass equals blocks alone;
    a cached block equals an uncached one."""
    ids = torch.randint(3, tiny.VOCABULARY, (1, 14), generator=torch.Generator().manual_seed(0))
    layout = Layout(2, (3, 4, 1, 4))
    own = tiny.backbone(kind)
    own.set_attn_implementation("eager")
    untouched = own(input_ids=ids).logits[0]
    model = tiny.model(kind)
    tolerance = {"atol": 2e-5, "rtol": 1e-5}  # RMSNorm and some heads compute in float32
    tokens = TokenMap.from_layouts([[layout]])

    clean = model(ids, tokens)[:, : tiny.VOCABULARY]
    torch.testing.assert_close(clean, untouched, **tolerance)

    block = block_numbers(tokens, maskable(tokens, model.spec.alignment))
    corruption = ExactCount().draw(block, torch.Generator().manual_seed(1))
    together = score_batch(model, ids, tokens, corruption).blocks[0]
    alone, past, at = 0.0, Past(), 2
    model(ids[:, :2], tokens[:, :2], past=past, keep=True)
    masked = torch.zeros_like(tokens.prompt)
    masked[maskable(tokens, model.spec.alignment)] = corruption.masked
    weight = torch.zeros(masked.shape, dtype=torch.float64)
    weight[maskable(tokens, model.spec.alignment)] = corruption.weight
    before = model(ids[:, :2], tokens[:, :2])[-1]
    for size in layout.blocks:
        here = slice(at, at + size)
        alone -= float(before.log_softmax(-1)[ids[0, at]])
        shown = ids[:, here].masked_fill(masked[:, here], model.spec.mask_id)
        cached = model(shown, tokens[:, here].as_noisy(), past=past)
        uncached = model(torch.cat([shown, ids[:, :at]], 1), TokenMap.cat(tokens[:, here].as_noisy(), tokens[:, :at]))[
            :size
        ]
        usable = slice(0, tiny.VOCABULARY)
        torch.testing.assert_close(cached[:, usable], uncached[:, usable], **tolerance)
        for i in range(1, size):
            if masked[0, at + i]:
                alone -= float(weight[0, at + i] * cached[i - 1].log_softmax(-1)[ids[0, at + i]])
        before = model(ids[:, here], tokens[:, here], past=past, keep=True)[-1]
        at += size
    assert float(together) == pytest.approx(alone, abs=1e-4)

    # twins: the block sees its own future, and another mask gives another number
    changed = ids.clone()
    changed[0, 8] = 3 + (ids[0, 8] - 2) % (tiny.VOCABULARY - 3)
    sees = Visibility(tokens.as_noisy(), tokens.as_noisy(), "context_causal").dense()[0, 0]
    assert sees[7 - 2, 8 - 2]
    moved = model(changed, tokens.as_noisy()) - model(ids, tokens.as_noisy())
    assert moved[5, : tiny.VOCABULARY].abs().max() > 1e-4
    other = ExactCount().draw(block, torch.Generator().manual_seed(2))
    assert abs(float(score_batch(model, ids, tokens, other).blocks[0]) - float(together)) > 1e-4


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3_text", "olmo3", "gpt_oss"])
@torch.no_grad()
def test_windowed_layers_keep_their_window(kind):
    model = tiny.model(kind)
    assert any("keep their sliding window of 6 tokens" in note for note in model.notes)
    tokens = TokenMap.from_layouts([[Layout(1, (1,) * 40)]])
    ids = torch.randint(3, tiny.VOCABULARY, (1, 41), generator=torch.Generator().manual_seed(0))
    wide = tiny.model(kind, sliding_window=64)
    assert (model(ids, tokens) - wide(ids, tokens))[:, : tiny.VOCABULARY].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("qwen3_next", r"qwen3_next does not obey the mask: layers 0-1 \(Qwen3NextGatedDeltaNet\) let \d+ token pairs"),
        ("bloom", "bloom builds its own attention and never asks for ours"),
        ("gptj", "gptj builds its own attention and never asks for ours"),
        ("mamba2", "mamba2 builds its own attention and never asks for ours"),
    ],
)
def test_models_that_cannot_obey_the_mask_are_refused(kind, message):
    network = tiny.backbone(kind, dtype=torch.float32)
    with pytest.raises(UnsupportedModel, match=message):
        attach(network)
    assert not network.config._attn_implementation.startswith("blockdiff")  # left as it was


def test_the_probe_catches_a_layer_that_looks_where_it_must_not(monkeypatch):
    """The twin of its acceptances: one layer with the mask ignored, by whatever cause, is found."""
    network = tiny.backbone("llama")
    inner = network.model.layers[1].self_attn.forward

    def leaky(*args, visibility=None, **kwargs):
        everyone = visibility.key.map(lambda t: torch.zeros_like(t))
        return inner(
            *args, visibility=Visibility(everyone[:, -visibility.query.shape[1] :], everyone, "block_causal"), **kwargs
        )

    monkeypatch.setattr(network.model.layers[1].self_attn, "forward", leaky)
    with pytest.raises(UnsupportedModel, match="llama does not obey the mask"):
        attach(network)


DEEP = {"num_hidden_layers": 36, "hidden_size": 64, "dtype": torch.bfloat16}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_rounding_in_a_deep_network_is_no_reason_to_refuse(kind, monkeypatch):
    """In bfloat16 36 layers with their experts' choices are far from what they would be in float32: the probe looks
    again there and finds no difference, or the one that is there."""
    network = tiny.backbone(kind, **DEEP)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    apart = []
    monkeypatch.setattr(probe, "_distance", lambda *given: apart.append(distance(*given)) or apart[-1])
    model = attach(network, add_mask=False)
    assert apart[0] > 0.1  # beyond what half precision is allowed
    assert model.reading.narrows
    assert {weight.dtype for weight in network.state_dict().values()} == {torch.bfloat16}
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())

    network = tiny.backbone(kind, **DEEP)
    inner = network.model.layers[20].self_attn.forward

    def other(*args, visibility=None, **kwargs):
        mixed, weights = inner(*args, visibility=visibility, **kwargs)
        return (mixed if visibility is None else 1.1 * mixed), weights

    monkeypatch.setattr(network.model.layers[20].self_attn, "forward", other)
    with pytest.raises(UnsupportedModel, match="attention computes something that ours does not"):
        attach(network, add_mask=False)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("sees", ["everything", "its whole block"])
def test_a_wrong_mask_is_refused_in_a_deep_network_in_half_precision_too(kind, sees, monkeypatch):
    network = tiny.backbone(kind, **DEEP)
    inner = network.model.layers[20].self_attn.forward

    def wrong(*args, visibility=None, **kwargs):
        if visibility is not None and sees == "everything":
            everyone = visibility.key.map(lambda t: torch.zeros_like(t))
            visibility = Visibility(everyone[:, -visibility.query.shape[1] :], everyone, "block_causal")
        elif visibility is not None:
            visibility = Visibility(visibility.query, visibility.key, "block_causal")
        return inner(*args, visibility=visibility, **kwargs)

    monkeypatch.setattr(network.model.layers[20].self_attn, "forward", wrong)
    with pytest.raises(UnsupportedModel, match="does not obey the mask"):
        attach(network, add_mask=False)


def test_a_type_that_the_kernels_cannot_do_is_refused_in_one_line():
    network = tiny.backbone("qwen3_moe", dtype=torch.bfloat16, moe_intermediate_size=12)
    network.set_experts_implementation("grouped_mm")
    with pytest.raises(
        UnsupportedModel, match=r"qwen3_moe does not run in bfloat16 on cpu \(.*; try another"
    ) as refused:
        attach(network)
    assert "\n" not in str(refused.value)


def test_calling_the_backbone_alone_is_an_error_not_a_wrong_answer():
    model = tiny.model("llama")
    with pytest.raises(UnsupportedModel, match="call the BlockDiffusionModel rather than its backbone"):
        model.backbone(input_ids=torch.tensor([[3, 4]]))


def test_a_model_is_attached_once():
    with pytest.raises(ValueError, match="attached already"):
        attach(tiny.model("llama").backbone)


def test_a_full_vocabulary_grows_by_a_mask_row_and_a_reserved_row_is_reused():
    tokenizer = train_tokenizer(["some words, some more words"], 300)
    rows = len(tokenizer)
    full = attach(tiny.backbone("llama", vocab_size=rows), tokenizer)
    assert (full.spec.mask_id, full.vocabulary) == (rows, rows + 1)
    padded = attach(tiny.backbone("llama", vocab_size=rows + 20), tokenizer)
    assert (padded.spec.mask_id, padded.vocabulary) == (rows, rows + 20)


@torch.no_grad()
def test_the_mask_row_starts_near_the_mean_embedding():
    for tied in (True, False):
        model = attach(tiny.backbone("llama", tie_word_embeddings=tied))
        for embedding in (model.backbone.get_input_embeddings(), model.backbone.get_output_embeddings()):
            others, row = embedding.weight[:-1], embedding.weight[-1]
            distance = (row - others.mean(0)).norm() / others.std(0).norm()
            assert 0.02 < float(distance) < 0.3


@torch.no_grad()
def test_saved_and_loaded_models_are_equal(tmp_path):
    tokenizer = train_tokenizer(["a b c"], 300)
    spec = Spec(
        alignment=Alignment("shift", "seed"),
        clean_context="block_causal",
        layout=ScaleMixture(8, {4: 0.25}),
        trained_length=32,
        ar_trained=False,
    )
    model = attach(tiny.backbone("qwen3", vocab_size=300), tokenizer, spec=spec)
    model.save(tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "block_diffusion.json", "tokenizer.json"} <= files
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in files)
    assert "blockdiff" not in (tmp_path / "model" / "config.json").read_text()
    described = json.loads((tmp_path / "model" / "block_diffusion.json").read_text())
    assert described["mask_id"] == model.spec.mask_id
    assert sum(described["token_share"].values()) == pytest.approx(1, abs=1e-3)

    again = load(tmp_path / "model")
    assert again.spec == model.spec
    ids, tokens, _ = tiny.random_batch(0)
    torch.testing.assert_close(again(ids, tokens), model(ids, tokens), atol=0, rtol=0)


def test_saving_replaces_a_directory_in_one_step(tmp_path, monkeypatch):
    model = tiny.model("llama")
    model.save(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(type(model), "save_into", lambda self, directory: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no half-written neighbour is left


def test_bad_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load(tmp_path / "missing" / "model")
    with pytest.raises(UnsupportedModel, match=r"no config\.json"):
        load(tmp_path)
    network = tiny.backbone("llama")
    network.config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"no \.safetensors weights"):
        load(tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin is a pickle, which can run code"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    network.save_pretrained(tmp_path)
    (tmp_path / "block_diffusion.json").write_text('{"mask_id": 3}')
    with pytest.raises(UnsupportedModel, match="not a blockdiff description"):
        load(tmp_path)


def test_attaching_keeps_the_mode_of_the_model():
    """A model in evaluation must not wake up with its dropout on."""
    assert not attach(tiny.backbone("gpt2")).backbone.training
    assert attach(tiny.backbone("gpt2").train()).backbone.training


def test_a_plain_checkpoint_stays_an_ar_model(tmp_path):
    tiny.backbone("llama").save_pretrained(tmp_path)
    model = load(tmp_path)
    assert not model.spec.is_diffusion
    assert model.vocabulary == tiny.VOCABULARY
    assert model.spec.trained_length == 64

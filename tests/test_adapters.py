"""Adapters: merged ones equal the adapted network, noisy-stream ones leave the AR model as it was, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from conftest import tiny_config, write_corpus
from safetensors.torch import load_file

import blockdiff
from blockdiff.adapters import Adapter
from blockdiff.attention import UnsupportedModel
from blockdiff.config import ConfigError, make_config
from blockdiff.layout import Layout, TokenMap
from blockdiff.loading import load, load_tokenizer
from blockdiff.noise import ExactCount
from blockdiff.objectives import block_numbers, maskable, token_losses, two_streams
from blockdiff.training import train

KINDS = ["llama", "qwen3", "gpt2", "gemma3_text"]


@pytest.fixture
def start(trained, tmp_path):
    """A tiny AR checkpoint of each kind, with the tokenizer of the small corpus."""

    def make(kind: str):
        tokenizer = load_tokenizer(trained / "checkpoint")
        assert tokenizer is not None
        folder = tmp_path / f"ar-{kind}"
        length = {"n_positions": 128} if kind == "gpt2" else {"max_position_embeddings": 128}
        network = tiny.backbone(kind, dtype=torch.float32, vocab_size=len(tokenizer), **length)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def adapted(folder, start, kind: str, **changes):
    """A short training with an adapter: (run directory, the folder it began from)."""
    tree = tiny_config(folder, train={"steps": 8, "log_every": 2, "save_every": 4, "learning_rate": 0.02})
    tree["model"] = {"init": str(start), "adapter": {"kind": kind, "rank": 4, **changes}}
    tree["eval"] = {"block_sizes": []}
    return train(make_config(tree))


def batch(vocabulary: int):
    generator = torch.Generator().manual_seed(0)
    tokens = TokenMap.from_layouts([[Layout(2, (3, 4, 1, 4)), Layout(1, (4, 2))], [Layout(3, (5, 6))]])
    return torch.randint(3, vocabulary - 1, tokens.shape, generator=generator), tokens


@torch.no_grad()
def masked_losses(model, ids, tokens):
    block = block_numbers(tokens, maskable(tokens, model.spec.alignment))
    draw = ExactCount().draw(block, torch.Generator().manual_seed(1))
    stream = two_streams(ids, tokens, draw, model.spec.alignment, model.spec.mask_id, with_ar=True)
    return token_losses(model(stream.ids, stream.tokens, read=stream.reads.index), stream.reads), stream.reads.kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_noisy_adapter_leaves_the_ar_model_bit_for_bit(start, tmp_path, kind):
    first = start(kind)
    run = adapted(tmp_path, first, "noisy")
    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    losses = [m["bound"] for m in logged if "bound" in m]
    assert losses[-1] < losses[0]
    model, untouched = load(run.checkpoint), load(first)
    ids, tokens = batch(model.vocabulary - 1)
    clean = model(ids, tokens)[:, : untouched.vocabulary]
    assert torch.equal(clean, untouched(ids, tokens))
    before, after = load_file(first / "model.safetensors"), load_file(run.checkpoint / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
    with model.adapter.off():  # twin: the adapter does act on the noisy stream
        without = masked_losses(model, ids, tokens)[0]
    found, what = masked_losses(model, ids, tokens)
    assert (found[what == 0] - without[what == 0]).abs().max() > 1e-2
    assert torch.equal(found[what != 0], without[what != 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_is_an_ordinary_checkpoint(start, tmp_path, kind):
    """Trained, saved merged, loaded: the same logits as with the adapter beside the weights."""
    run = adapted(tmp_path, start(kind), "lora")
    merged = load(run.checkpoint)
    assert merged.adapter is None
    assert not (run.checkpoint / "adapter.safetensors").exists()
    assert merged.spec.adapter is None
    beside = load(start(kind), add_mask=True)
    beside.attach_adapter(Adapter("lora", rank=4))
    beside.adapter.load(run.trainer / "checkpoint-8", beside.backbone)
    beside.eval()
    ids, tokens = batch(merged.vocabulary - 1)
    torch.testing.assert_close(
        masked_losses(merged, ids, tokens)[0], masked_losses(beside, ids, tokens)[0], atol=2e-5, rtol=2e-5
    )
    other = load(start(kind), add_mask=True)
    assert (masked_losses(merged, ids, tokens)[0] - masked_losses(other, ids, tokens)[0]).abs().max() > 1e-2


def test_the_noisy_pass_in_two_is_the_pass_in_one(start):
    """Before it is trained an adapter does nothing: two passes over the cache equal the two-stream pass."""
    first = start("llama")
    plain, frozen = load(first, add_mask=True), load(first, add_mask=True)
    frozen.attach_adapter(Adapter("noisy"))
    frozen.eval()
    ids, tokens = batch(plain.vocabulary - 1)
    torch.testing.assert_close(masked_losses(frozen, ids, tokens), masked_losses(plain, ids, tokens), atol=1e-5, rtol=0)
    trainable = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name or name == "adapter.mask_row" for name in trainable)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_without_a_noisy_token_has_gradients_of_zero(start, kind):
    """Blocks of one token alone: the losses are the clean stream's, and the adapter learns nothing from them."""
    model = load(start(kind), add_mask=True)
    model.attach_adapter(Adapter("noisy"))
    ids, _ = batch(model.vocabulary - 1)
    for sizes, learns in (((1, 1, 1, 1), False), ((1, 2, 1), True)):
        tokens = TokenMap.from_layouts([[Layout(2, sizes)] * 2] * 2)
        block = block_numbers(tokens, maskable(tokens, model.spec.alignment))
        draw = ExactCount().draw(block, torch.Generator().manual_seed(1))
        ids = ids[:, : tokens.shape[1]]
        stream = two_streams(ids, tokens, draw, model.spec.alignment, model.spec.mask_id, with_ar=True)
        asked = {"read": stream.reads.index, "target": stream.reads.target}
        model.zero_grad()
        losses = model(stream.ids, stream.tokens, **asked)
        losses.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(losses.detach(), model(stream.ids, stream.tokens, **asked), atol=1e-5, rtol=0)
        trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert all(gradient is not None for gradient in trained)
        assert any(bool(gradient.any()) for gradient in trained) == learns


def test_training_goes_through_passes_without_a_noisy_token(start, tmp_path):
    tree = tiny_config(
        tmp_path, train={"steps": 6, "rows": 1, "log_every": 1, "learning_rate": 0.02}, eval={"block_sizes": []}
    )
    tree["model"] = {"init": str(start("llama")), "adapter": {"kind": "noisy", "rank": 4}}
    tree["layout"] = {"kind": "mixture", "shares": {"1": 0.5, "8": 0.5}}
    run = train(make_config(tree))
    norms = [json.loads(line).get("grad_norm") for line in run.metrics.read_text().splitlines()]
    assert {norm == 0 for norm in norms if norm is not None} == {True, False}


@pytest.mark.parametrize("kind", ["noisy", "lora"])
def test_adapters_resume_to_the_same_end(start, tmp_path, kind):
    first = start("llama")
    runs = []
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        run = adapted(folder, first, kind)
        if name == "resumed":
            shutil.rmtree(run.trainer / "checkpoint-8")
            shutil.rmtree(run.checkpoint)
            tree = make_config({**_tree(run), "output": str(run.path)})
            run = train(tree, resume=True)
        runs.append(run)
    tensors = [load_file(run.trainer / "checkpoint-8" / "adapter.safetensors") for run in runs]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def _tree(run) -> dict:
    import yaml

    return yaml.safe_load(run.config.read_text())


def test_decoding_at_block_size_one_is_the_users_own_model(start, tmp_path):
    first = start("llama")
    model = blockdiff.load(adapted(tmp_path, first, "noisy").checkpoint)
    own = blockdiff.load(first)
    for prompt in ("the cat", "a dog ate"):
        assert model.generate(prompt, max_new_tokens=20, block_size=1)[0].tokens == (
            own.generate(prompt, max_new_tokens=20)[0].tokens
        )
    blocks = model.generate(["the cat"], max_new_tokens=12, block_size=4, policy="fixed_count")[0]
    assert len(blocks.tokens) <= 12
    assert blocks.denoise_forwards > 0


def test_targets_that_match_nothing_and_other_mistakes_are_loud(start, tmp_path):
    first = start("llama")
    with pytest.raises(UnsupportedModel, match=r"no linear layer is called attn_out; this model has q_proj, k_proj"):
        adapted(tmp_path, first, "lora", targets=["q_proj", "attn_out"])
    tree = tiny_config(tmp_path)
    tree["model"] = {"init": str(first), "adapter": {"kind": "noisy"}, "clean_context": "block_causal"}
    tree["objective"] = {}
    with pytest.raises(ConfigError, match="noisy needs clean_context context_causal"):
        make_config(tree)
    tree["model"] = {"init": str(first), "adapter": {"kind": "noisy", "rank": 0}}
    with pytest.raises(ConfigError, match="rank must be 1 or more"):
        make_config(tree)
    with pytest.raises(UnsupportedModel, match=r"has no \[MASK\] row to adapt"):
        load(first).attach_adapter(Adapter("lora"))
    write_corpus(tmp_path)


def test_a_frozen_adapter_is_trained_on_as_it_is_or_not_at_all(start, tmp_path):
    """A config without the key goes on with the checkpoint's own adapter; what it learns is there after loading."""
    run = adapted(tmp_path, start("llama"), "noisy")
    tree = tiny_config(tmp_path, output=str(tmp_path / "more"))
    tree["model"], tree["objective"] = {"init": str(run.checkpoint)}, {"ar_weight": 0.0}
    tree["train"] = {**tree.get("train", {}), "steps": 20, "learning_rate": 3e-2}
    tree["eval"] = {"block_sizes": []}
    more = load(train(make_config(tree)).checkpoint)
    first = load(run.checkpoint)
    assert more.spec.adapter == first.spec.adapter == Adapter("noisy", rank=first.spec.adapter.rank)
    ids, tokens = batch(first.vocabulary - 1)
    assert torch.equal(more(ids, tokens), first(ids, tokens))
    (after, what), (before, _) = masked_losses(more, ids, tokens), masked_losses(first, ids, tokens)
    assert (after[what == 0] - before[what == 0]).abs().max() > 1e-2
    for changes, words in (
        ({"model": {"init": str(run.checkpoint), "adapter": {"kind": "lora"}}}, "can only be trained on as it is"),
        ({"model": {"init": str(run.checkpoint), "adapter": {"kind": "noisy", "rank": 9}}}, "rank: 4"),
        ({"objective": {"ar_weight": 0.5}}, "whose clean stream is not trained"),
        ({"objective": {"ar_weight_end": 0.5}}, "whose clean stream is not trained"),
    ):
        with pytest.raises(ConfigError, match=words):
            train(make_config({**tree, **changes, "output": str(tmp_path / "refused")}))


def test_a_damaged_adapter_is_one_line(start, tmp_path):
    run = adapted(tmp_path, start("llama"), "noisy")
    file = run.checkpoint / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UnsupportedModel, match="damaged"):
        load(run.checkpoint)

"""Broken input and broken checkpoints: one line that names them, and nothing lost."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from conftest import full_disk, tiny_config
from safetensors.torch import load_file, save_file

import blockdiff
from blockdiff.attention import UnsupportedModel
from blockdiff.config import ConfigError, load_config, make_config
from blockdiff.data import Encoder, read_corpus
from blockdiff.datafiles import DataError
from blockdiff.files import replace_directory
from blockdiff.loading import attach, load
from blockdiff.run_directory import RunDirectory
from blockdiff.tokenizer import train_tokenizer
from blockdiff.training import train


@pytest.fixture
def checkpoint(trained, tmp_path):
    return Path(shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint"))


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_that_are_missing_are_named_and_not_made_up(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({n: t for n, t in tensors.items() if n != name}, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=f"1 weights are missing, among them {name}"):
        load(checkpoint)


@pytest.mark.parametrize("damage", ["cut", "junk", "empty"])
def test_broken_weights_are_one_line(checkpoint, damage):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "junk": b"no tensors at all", "empty": b""}[damage])
    with pytest.raises((UnsupportedModel, FileNotFoundError), match="checkpoint: ") as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_id": 999999}, "mask_id 999999 lies beyond the model's"),
        ({"mask_id": "5"}, "mask_id '5' is no whole number"),
        ({"mask_id": True}, "mask_id True is no whole number"),
        ({"mask_id": -1}, "mask_id -1 is negative"),
        ({"layout": "x"}, "not a blockdiff description"),
        ({"clean_context": "foo"}, "clean_context 'foo'"),
        ({"format": 99}, "format 99, this version reads 1"),
        ({"trained_length": -3}, "trained_length -3 is negative"),
    ],
)
def test_broken_descriptions_are_refused(checkpoint, changes, message):
    change_json(checkpoint / "block_diffusion.json", **changes)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_broken_config_or_tokenizer_is_one_line(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises((UnsupportedModel, FileNotFoundError)) as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)
    change_json(checkpoint / "config.json", hidden_size=48)
    with pytest.raises(UnsupportedModel) as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_tokenizers_own_mask_row_is_used_and_woken_up():
    tokenizer = train_tokenizer(["a b c"], 300)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    asleep = tiny.backbone("llama", vocab_size=len(tokenizer))
    row = asleep.get_input_embeddings().weight[tokenizer.mask_token_id]
    row.zero_()
    model = attach(asleep, tokenizer)
    assert model.spec.mask_id == tokenizer.mask_token_id
    norms = model.backbone.get_input_embeddings().weight.norm(dim=1)
    assert norms[model.spec.mask_id] > 0.05 * norms.median()
    trained = tiny.backbone("llama", vocab_size=len(tokenizer), seed=3)
    before = trained.get_input_embeddings().weight[tokenizer.mask_token_id].clone()
    attach(trained, tokenizer)
    assert torch.equal(trained.get_input_embeddings().weight[tokenizer.mask_token_id], before)  # not asleep
    short = tiny.backbone("llama", vocab_size=len(tokenizer) - 1)
    assert attach(short, tokenizer).vocabulary == len(tokenizer)  # its row did not exist


def test_an_ar_run_remembers_how_long_its_rows_were(tmp_path):
    run = train(make_config(tiny_config(tmp_path, layout={"kind": "ar"}, train={"steps": 2})))
    spec = load(run.checkpoint).spec
    assert (spec.trained_length, spec.is_diffusion, spec.layout.kind) == (64, False, "ar")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"kind": "fixed", "size": 4}, 4),
        ({"kind": "fixed", "size": 40}, 40),
        ({"kind": "random_offset", "size": 32}, 32),
        ({"kind": "mixture", "shares": {24: 0.4, 32: 0.6}}, 32),
        ({"kind": "full"}, 63),
        ({"kind": "scale_mixture", "max_size": 32, "atoms": {4: 0.3, 8: 0.3}}, 8),
        ({"kind": "uniform", "max_size": 32}, 16),
    ],
)
def test_decoding_defaults_to_a_block_size_that_was_trained(layout, expected):
    from blockdiff import distributions
    from blockdiff.model import Spec

    spec = Spec(mask_id=5, layout=distributions.from_dict(layout), trained_length=64)
    assert spec.default_block_size == expected
    assert spec.layout.token_share(63)[expected] > 0


def test_a_new_run_replaces_an_old_one_only_when_its_input_is_good(tmp_path):
    tree = tiny_config(tmp_path, train={"steps": 2})
    run = train(make_config(tree))
    before = (run.checkpoint / "model.safetensors").read_bytes()

    def whole() -> bool:
        return (run.checkpoint / "model.safetensors").read_bytes() == before and run.metrics.exists()

    with pytest.raises(ConfigError, match=r"is finished; use .*checkpoint, or start anew with --overwrite"):
        train(make_config(tree), resume=True)
    assert whole()
    with pytest.raises(DataError, match="no such file"):
        train(make_config(tree | {"data": tree["data"] | {"train": str(tmp_path / "none.jsonl")}}), overwrite=True)
    assert whole()
    with pytest.raises(ConfigError, match=r"model.init: .* lies where a new run in .* clears; set another output"):
        train(make_config(tree | {"model": {"init": str(run.checkpoint)}}), overwrite=True)
    assert whole()
    sizes = tree | {"eval": {"block_sizes": [1, 4, 60], "draws": 2}}
    with pytest.raises(ValueError, match="block size 60 is longer than the data"):
        train(make_config(sizes), overwrite=True)
    assert whole()


@pytest.mark.parametrize("save_every", [2, None])
def test_a_disk_that_is_full_at_the_very_end_is_one_line(tmp_path, monkeypatch, save_every):
    config = make_config(tiny_config(tmp_path, train={"steps": 3, "save_every": save_every}, eval={"block_sizes": []}))
    kept = Path(config.output) / "trainer" / "checkpoint-3" if save_every else None
    save = blockdiff.model.BlockDiffusionModel.save

    def save_on_a_full_disk(model, path):
        with full_disk():
            save(model, path)

    monkeypatch.setattr(blockdiff.model.BlockDiffusionModel, "save", save_on_a_full_disk)
    with pytest.raises(OSError, match=r"could not write the finished model: .*checkpoint: .*; make room") as caught:
        train(config)
    assert str(caught.value).endswith(
        ("; --resume goes on from " + str(kept)) if kept else "kept (train.save_every is none)"
    )
    assert "\n" not in str(caught.value)
    assert not RunDirectory(Path(config.output)).checkpoint.exists()


def test_a_directory_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if Path(to) == target and self.name != "was":
            raise OSError("no room for the name")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no room"), replace_directory(target) as staging:
        (staging / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


CHAT = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture
def encoder() -> Encoder:
    tokenizer = train_tokenizer(["\n\n\n\n a b c hello"] * 50, 280)
    tokenizer.chat_template = CHAT
    return Encoder(tokenizer, tokenizer.eos_token_id, (tokenizer.eos_token_id,))


def test_a_token_across_a_turn_is_split_where_decoding_splits_it(encoder):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nhello"}]
    document = encoder.chat(messages, "x:1")
    ids, scored = document.ids.tolist(), (~document.prompt).tolist()
    before = encoder.tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    decoding = encoder.tokenizer(before, add_special_tokens=False)["input_ids"]
    assert ids[: scored.index(True)] == decoding
    assert encoder.tokenizer.decode(ids[scored.index(True) :]).startswith("\n\nhello")
    merged = encoder.tokenizer(before + "\n\nhello", add_special_tokens=False)["input_ids"]
    assert merged[: len(decoding)] != decoding  # twin: tokenized as a whole, a token lies across


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "hello a b c"}\n' * 500, mtime=0)[:-20],
            "a.jsonl.gz: not a whole gzip file",
        ),
        ("a.jsonl.gz", b"plain text", "a.jsonl.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"hello " * 500, mtime=0)[:-9], "a.txt.gz: not a whole gzip file"),
        ("a.parquet", b"PAR1 and nothing else", "a.parquet: not a whole parquet file"),
        ("a.jsonl", b'{"text": "half \\ud83d of a pair"}', "a.jsonl:1: holds half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: (nested too deeply|not JSON)"),
        ("a.txt.jsonl", b'{"text": 3}', "a.txt.jsonl:1: has 'text'"),
    ],
)
def test_broken_files_are_named(encoder, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_corpus(tmp_path / name, encoder)
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_a_chat_is_a_bad_row(encoder, tmp_path):
    encoder.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    row = {"messages": [{"role": "assistant", "content": "hi"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + '\n{"text": "hello a b"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template refuses this .*roles must alternate"):
        read_corpus(tmp_path / "a.jsonl", encoder)
    assert len(read_corpus(tmp_path / "a.jsonl", encoder, "skip").documents) == 1


def test_prompts_that_fill_the_rows_are_an_error_and_counted(tmp_path):
    rows = [
        {"prompt": "the cat sat on the mat . " * 30, "completion": "yes"},
        {"prompt": "a", "completion": " dog ate ."},
    ]
    tree = tiny_config(tmp_path, train={"steps": 2}, eval={"block_sizes": []})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    train(make_config(tree), say=said.append)
    assert "1 whose prompt fills a row were left out" in said[0]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(ConfigError, match=r"data.length: every prompt fills a row of 64 tokens"):
        train(make_config(tree), overwrite=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["a.b=[1"], "--set a.b=.1: the value is not YAML"),
        (["preset=[a]"], "preset .'a'. is unknown"),
        (["preset=5"], "preset 5 is unknown"),
        (["layout={kind: mixture, shares: {4: .nan}}"], "must be positive"),
        (["layout={kind: geometric, mean: .inf}"], "mean block length inf"),
        (["objective.weighting=[]"], "objective.weighting"),
        (["objective.weighting=[-1]"], "objective.weighting"),
        (["objective.ar_weight=.nan"], "objective.ar_weight"),
        (["output="], "output"),
        (["seed=99999999999"], "seed"),
        (["layout={kind: ar}", "model.prediction=same"], "prediction same cannot predict in layout ar"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, message):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(tmp_path / "c.yaml", changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"type": "lama"}, "'lama' is unknown; did you mean llama"),
        ({"type": "llama", "hiden_size": 32}, "llama has no such key; did you mean hidden_size?"),
        ({"type": "llama", "hidden_size": "big"}, "llama cannot be built so"),
        ({"type": "llama", "hidden_size": 0}, "llama cannot be built so|does not"),
    ],
)
def test_architectures_that_cannot_be_are_one_line(tmp_path, architecture, message):
    tree = tiny_config(tmp_path, train={"steps": 1})
    tree["model"] = {"architecture": architecture, "vocabulary": 300}
    with pytest.raises(UnsupportedModel, match=message) as caught:
        train(make_config(tree))
    assert "\n" not in str(caught.value)


def test_a_config_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"output: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: not YAML"):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path)


def test_prompts_that_are_no_text(trained):
    model = blockdiff.load(trained / "checkpoint")
    assert model.generate([]) == []
    with pytest.raises(ValueError, match="the prompt is not text: character 1 is no Unicode"):
        model.generate("a\udcff")

"""DiffusionGemma, tiny and random: our texts are those of transformers' own `generate`, and its passes are counted."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import run
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig

import blockdiff
from blockdiff import UnsupportedModel, load_writer
from blockdiff.decode import Sampling
from blockdiff.diffusion_gemma import DiffusionGemma
from blockdiff.engine import Step
from blockdiff.inspecting import inspect
from blockdiff.loading import load_tokenizer

# transformers' generate imports torch's compiler, which warns of itself
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

CANVAS = 8
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "initializer_range": 0.4,
}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
VISION |= {"num_key_value_heads": 1, "position_embedding_size": 16}
STEPS = "entropy + entropy_budget(0.1, own=True) + renoise(steps=3)"


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = load_tokenizer(trained / "checkpoint")
    assert tokenizer is not None
    size = len(tokenizer) + 1  # and a token for images
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = DiffusionGemmaConfig(
        text_config={**TEXT, **special, "vocab_size": size},
        vision_config={**VISION, "model_type": "gemma4_vision"},
        canvas_length=CANVAS,
        image_token_id=size - 1,
    )
    torch.manual_seed(0)
    network = DiffusionGemmaForBlockDiffusion(config)
    network.generation_config.update(max_denoising_steps=5, sampler_config=EntropyBoundSamplerConfig(0.3))
    network.generation_config.update(t_max=0.9, t_min=0.5, stability_threshold=2, confidence_threshold=0.01)
    target = tmp_path_factory.mktemp("gemma") / "model"
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def model(folder: Path) -> DiffusionGemma:
    found = load_writer(folder)
    assert isinstance(found, DiffusionGemma)
    return found


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def theirs(model: DiffusionGemma, prompt: str, seed: int, **settings: Any) -> tuple[list[int], int, int]:
    """What transformers' `generate` writes after a prompt, called directly, and its passes of decoder and encoder."""
    ids = torch.tensor([model.encode(prompt)], device=model.device)
    passes = {"decoder": 0, "encoder": 0}

    def count(name: str) -> Any:
        def counted(*_: object) -> None:
            passes[name] += 1

        return counted

    parts = model.network.model
    hooks = [getattr(parts, name).register_forward_hook(count(name)) for name in passes]
    torch.manual_seed(seed)
    found = model.network.generate(ids, eos_token_id=list(model.end_ids), **settings)
    for hook in hooks:
        hook.remove()
    return found.sequences[0, ids.shape[1] :].tolist(), passes["decoder"], passes["encoder"]


@pytest.mark.parametrize("tokens", [5, CANVAS, 2 * CANVAS + 3])
def test_texts_are_those_of_transformers_and_passes_are_counted(model, tokens):
    """Within a canvas, at its border and beyond it, with the checkpoint's own settings."""
    first, second = model.generate(["the cat", "a dog ate"], max_new_tokens=tokens, seed=3)
    for number, (prompt, output) in enumerate([("the cat", first), ("a dog ate", second)]):
        expected, decoder, encoder = theirs(model, prompt, 3 + number, max_new_tokens=tokens)
        assert len(expected) == -(-tokens // CANVAS) * CANVAS
        assert output.tokens == expected[:tokens]
        assert (output.denoise_forwards, output.commit_forwards) == (decoder, encoder - 1)
        assert output.blocks == [min(CANVAS, tokens - at) for at in range(0, tokens, CANVAS)]
        assert sum(output.steps_per_block) == decoder
        assert (output.positions, output.finish_reason) == ((decoder + encoder - 1) * CANVAS, "length")
        assert output.text == model.tokenizer.decode(output.tokens, skip_special_tokens=True)
    assert model.generate("a dog ate", max_new_tokens=tokens, seed=4)[0].tokens == second.tokens
    assert model.generate("a dog ate", max_new_tokens=tokens, seed=5)[0].tokens != second.tokens


def test_settings_reach_the_sampler(model):
    """Policy and temperature give what the same settings give in transformers, each another text than without."""
    plain = model.generate("the cat", max_new_tokens=16)[0]
    easy = "entropy + entropy_budget(30, own=True) + renoise(settled=9.0, steps=40)"
    own = {
        "sampler_config": EntropyBoundSamplerConfig(30.0),
        "max_denoising_steps": 40,
        "t_min": 0.02,
        "t_max": 0.02 + 1e-12,
    }
    own |= {"confidence_threshold": 9.0, "stability_threshold": 1}
    settled = model.generate("the cat", max_new_tokens=16, policy=easy, sampling=Sampling(0.02))[0]
    expected, decoder, _ = theirs(model, "the cat", 0, max_new_tokens=16, **own)
    assert (settled.tokens, settled.denoise_forwards) == (expected, decoder)
    assert settled.tokens != plain.tokens
    assert settled.denoise_forwards < 2 * 40  # the canvases stood still before their last step

    hot = model.generate("the cat", max_new_tokens=16, sampling=Sampling(1.5))[0]
    expected, _, _ = theirs(model, "the cat", 0, max_new_tokens=16, t_min=1.5, t_max=1.5 + 1e-12)
    assert hot.tokens == expected != plain.tokens

    short = model.generate("the cat", max_new_tokens=16, policy=STEPS)[0]
    assert (short.denoise_forwards, short.steps_per_block) == (6, [3, 3])


def test_the_generators_of_torch_go_on_as_before(model):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    model.generate("the cat", max_new_tokens=4)
    assert torch.equal(torch.rand(3), expected)


def test_texts_end_at_end_tokens_and_stop_strings(copy):
    plain = load_writer(copy).generate("the cat", max_new_tokens=20)[0]
    rewrite(copy / "generation_config.json", eos_token_id=[plain.tokens[10]], pad_token_id=0)
    model = load_writer(copy)
    ended = model.generate("the cat", max_new_tokens=20)[0]
    at = plain.tokens.index(plain.tokens[10])
    assert (ended.tokens, ended.finish_reason) == (plain.tokens[: at + 1], "end")
    assert ended.denoise_forwards < plain.denoise_forwards  # the canvas after it is not written
    stop = plain.text[4:7]
    stopped = load_writer(copy).generate("the cat", max_new_tokens=20, stop=[stop])[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(stop)]


def test_a_context_holds_whole_canvases(model):
    prompt = "the cat sat on the mat . " * 8
    room = model.context_length - len(model.encode("the cat"))
    output = model.generate("the cat", max_new_tokens=500)[0]
    assert (len(output.tokens), output.finish_reason) == (room // CANVAS * CANVAS, "length")
    with pytest.raises(ValueError, match="no room for a canvas of 8 behind it: shorten the prompt"):
        model.generate(prompt * 3)


def test_steps_are_those_since_which_a_token_stayed(model):
    told: list[Step] = []
    pieces: list[str] = []
    (output,) = model.generate(
        "the cat", max_new_tokens=12, on_step=told.append, on_text=lambda number, piece: pieces.append(piece)
    )
    assert "".join(pieces) == output.text
    assert len(told) == output.denoise_forwards
    start = len(model.encode("the cat"))
    assert [step.start for step in told] == [start] * 5 + [start + CANVAS] * 5
    for at, (token, since) in enumerate(zip(output.tokens, output.steps)):
        drafts = [step.tokens[at % CANVAS] for step in told if step.start == start + at // CANVAS * CANVAS]
        assert drafts[since - 1 :] == [token] * (len(drafts) - since + 1)
        assert since == 1 or drafts[since - 2] != token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--block-size", 4], "block_size does not go with DiffusionGemma: its canvas has one size"),
        (["--lossless"], "lossless does not go with DiffusionGemma"),
        (["--stepwise", 2], "stepwise does not go with DiffusionGemma"),
        (["--max-forwards", 3], "max_forwards does not go with DiffusionGemma"),
        (["--regex", "a+"], "regex does not go with DiffusionGemma"),
        (["--json-schema", '{"type": "string"}'], "json_schema does not go with DiffusionGemma"),
        (["--strict-coverage"], "strict_coverage does not go with DiffusionGemma"),
        (["--policy", "low_confidence"], "DiffusionGemma has one sampler, diffusion_gemma"),
        (["--policy", "threshold + particles(4)"], "DiffusionGemma has one sampler"),
        (["--threshold", 0.5], "DiffusionGemma has one sampler"),
        (["--per-step", 2], "DiffusionGemma has one sampler"),
        (["--temperature", 0], "temperature 0 is not possible"),
        (["--top-k", 3], "top_k and top_p do not go with DiffusionGemma"),
        (["--temperature", 1, "--top-p", 0.5], "top_k and top_p do not go with DiffusionGemma"),
        (["--max-new-tokens", 0], "max_new_tokens is 0"),
    ],
)
def test_options_without_a_meaning_are_refused(folder, options, message, capsys):
    code, out, error = run("generate", folder, "--prompt", "the cat", *options, capsys=capsys)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert message in error


def test_images_are_refused(model):
    image = model.network.config.image_token_id
    with pytest.raises(ValueError, match="images are not read here"):
        model.write([model.request((1, image, 5))])


def test_other_commands_refuse_it_in_one_line(folder, tmp_path, capsys):
    data = tmp_path / "valid.jsonl"
    data.write_text('{"text": "the cat sat on the mat ."}\n')
    commands = [
        ("eval", "bound", folder, "--data", data),
        ("eval", "coverage", folder),
        ("eval", "tasks", folder, "--harness", "lambada"),
        ("serve", folder, "--port", 0),
        ("chat", folder),
        ("export", folder, tmp_path / "out"),
        ("infill", folder, "--prefix", "a", "--suffix", "b"),
        ("sample", folder, "--documents", 2, "--out", tmp_path / "s.jsonl"),
    ]
    for command in commands:
        code, _, error = run(*command, capsys=capsys)
        assert (code, error.count("\n")) == (2, 1), (command, error)
        assert "DiffusionGemma" in error
        if command[1] == "bound":
            assert "No bound: the noise schedule and loss weights of its training are not in transformers" in error
    with pytest.raises(UnsupportedModel, match=r"blockdiff\.load_writer"):
        blockdiff.load(folder)


def test_generate_prints_and_writes_what_python_gives(folder, model, tmp_path, capsys):
    options = ["--prompt", "the cat", "--max-new-tokens", 12, "--seed", 7, "--policy", STEPS, "--temperature", 0.7]
    files = ["--json", tmp_path / "out.json", "--trace", tmp_path / "traces.json"]
    code, out, error = run("generate", folder, *options, *files, capsys=capsys)
    assert code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    expected = model.generate("the cat", max_new_tokens=12, seed=7, policy=STEPS, sampling=Sampling(0.7))[0]
    assert (result["tokens"], result["text"]) == (expected.tokens, expected.text)
    assert out == f"the cat{expected.text}\n"
    assert (result["forwards"], result["denoise_forwards"], result["commit_forwards"]) == (7, 6, 1)
    assert "12 tokens, 7 forwards (6 denoise, 1 commit, 0 verify)" in error
    assert {"seed", "versions", "seconds"} <= set(result)
    (trace,) = json.loads((tmp_path / "traces.json").read_text())["rows"]
    assert (trace["name"], trace["temperature"], len(trace["frames"])) == ("blocks of 8", "0.7", 6)
    code, out, _ = run("generate", folder, *options, "--show-steps", capsys=capsys)
    assert (code, out.count("step")) == (0, 6)


def test_batches_are_the_same_texts_and_go_on(folder, model, template, tmp_path, capsys):
    rows = [{"prompt": "the cat", "id": "a"}, {"messages": [{"role": "user", "content": "a dog"}]}, {"prompt": 5}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["generate", folder, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out"]
    command += ["--max-new-tokens", 10, "--chat-template", template]
    code, _, _ = run(*command, capsys=capsys)
    assert code == 1  # the third row is none
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert (answers[0]["id"], answers[0]["text"]) == ("a", model.generate("the cat", max_new_tokens=10)[0].text)
    chatting = load_writer(folder)
    chatting.set_chat_template(template)
    ids = tuple(chatting.encode_chat(rows[1]["messages"]))
    assert answers[1]["text"] == chatting.write([chatting.request(ids, max_new_tokens=10, seed=1)])[0].text
    assert answers[1]["prompt_tokens"] == len(ids)
    assert "a row needs the text 'prompt'" in answers[2]["error"]
    (tmp_path / "out" / "parts" / "part-00000001.jsonl").unlink()
    before = (tmp_path / "out" / "answers.jsonl").read_bytes()
    _, _, error = run(*command, capsys=capsys)
    assert "1 rows answered" in error
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == before
    code, _, error = run(*command, "--temperature", 1.2, capsys=capsys)
    assert (code, error.count("\n")) == (2, 1)
    assert "holds the answers of another run" in error
    code, _, error = run(*command, "--lossless", capsys=capsys)
    assert (code, "lossless does not go with DiffusionGemma" in error) == (2, True)
    code, _, error = run(*command, "--strict-coverage", capsys=capsys)
    assert (code, "strict_coverage does not go with DiffusionGemma" in error) == (2, True)


def test_questions_are_answered_and_scored(folder, model, tmp_path, capsys):
    (tmp_path / "ask.jsonl").write_text('{"prompt": "one and one", "answer": "2"}\n' * 2)
    options = ["--data", tmp_path / "ask.jsonl", "--max-new-tokens", 10, "--samples", 2, "--at", "1,2"]
    code, _, _ = run("eval", "tasks", folder, *options, "--json", tmp_path / "out.json", capsys=capsys)
    assert code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    (row,) = result["rows"]
    assert (row["block_size"], row["n"], row["samples"], row["forwards"]) == (CANVAS, 2, 2, 4 * 11)
    assert result["temperatures"] == [0.9, 0.5]
    first = model.generate("one and one", max_new_tokens=10)[0]
    assert result["outputs"][0]["text"] == first.text
    assert len({output["text"] for output in result["outputs"]}) == 4
    code, _, error = run("eval", "tasks", folder, *options, "--lossless", capsys=capsys)
    assert (code, "lossless does not go with DiffusionGemma" in error) == (2, True)


def test_texts_are_judged_at_budgets(folder, trained, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text((json.dumps({"text": "the cat sat on the mat . " * 12}) + "\n") * 4)
    (tmp_path / "plan.yaml").write_text(
        f"data: {tmp_path / 'long.jsonl'}\njudge: {trained / 'checkpoint'}\nnew_tokens: 12\nprompt_tokens: 4\n"
        "texts: 2\ngroups: 2\nbudgets: [1, 4, 8]\ntemperatures: [0.5, 1.0]\n"
        f"ways: {{gemma: {{model: {folder}, block_size: {CANVAS}, policy: diffusion_gemma}}}}\n"
    )
    command = ["eval", "generation", tmp_path / "plan.yaml", "--json", tmp_path / "out.json"]
    code, _, error = run(*command, capsys=capsys)
    assert code == 0, error
    result = json.loads((tmp_path / "out.json").read_text())
    assert [(row["budget"], row["temperature"]) for row in result["rows"]] == [(4, 0.5), (4, 1), (8, 0.5), (8, 1)]
    assert [row["forwards_per_text"] for row in result["rows"]] == [5, 5, 9, 9]  # two canvases, one of them committed
    assert result["skipped"] == ["gemma: 2 blocks of 8 cannot take 1 forwards"]
    assert all(row["judge_nll"] > 0 and row["entropy"] > 0 for row in result["rows"])
    for change, message in [
        ("ways.gemma.policy=first_hitting", "ways.gemma: policy random"),
        ("ways.gemma.block_size=4", "ways.gemma: DiffusionGemma's canvas is its block; give block_size 8"),
        ("temperatures=[0.0, 1.0]", "ways.gemma: temperature 0 is not possible"),
        ("new_tokens=62", "do not fit the model's context of 64"),
    ]:
        code, _, error = run(*command, "--set", change, capsys=capsys)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error


def test_inspect_says_what_it_is_and_what_works(folder, copy, tmp_path, capsys):
    code, out, _ = run("inspect", folder, "--json", tmp_path / "seen.json", capsys=capsys)
    assert code == 0
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["family"], seen["loads"]) == ("DiffusionGemma", True)
    assert seen["commands"] == ["generate", "eval tasks --data", "eval generation"]
    known = seen["conventions"]
    assert known["block_size"] == {"value": CANVAS, "source": "config.json, canvas_length"}
    assert (known["mask_id"]["value"], known["clean_context"]["value"]) == ("none", "context_causal")
    assert "uniformly" in known["noise"]["value"]
    assert "last prediction" in known["conditioning"]["value"]
    assert "causal encoder" in known["architecture"]["value"]
    assert "max_denoising_steps 5" in known["sampler"]["value"]
    assert "no bound" in seen["note"]
    assert "for generate, eval tasks --data, eval generation alone" in out

    (copy / "generation_config.json").unlink()
    rewrite(copy / "config.json", canvas_length=16)
    for file in copy.glob("tokenizer*"):
        file.unlink()
    code, out, _ = run("inspect", copy, "--json", tmp_path / "seen.json", capsys=capsys)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["loads"], seen["problem"], seen["conventions"]["block_size"]["value"]) == (False, "no tokenizer", 16)
    assert seen["conventions"]["sampler"]["value"] == "transformers' own settings"


def test_what_writes_texts_is_told_by_its_config(trained, model):
    """The twin: other checkpoints load as they do, and their requests are not DiffusionGemma's."""
    plain = load_writer(trained / "checkpoint")
    assert isinstance(plain, blockdiff.Model)
    with pytest.raises(ValueError, match="needs requests of its own"):
        model.write([plain.request((1, 5))])
    with pytest.raises(TypeError, match="no option 'blocksize'"):
        model.generate("the cat", blocksize=4)
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load_writer("/nowhere")


def test_the_commands_of_the_page_run(folder, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    section = page[page.index("## DiffusionGemma") :]
    (tmp_path / "test.jsonl").write_text('{"prompt": "one and one", "answer": "2"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    commands = re.findall(r"^blockdiff (.*)$", section.replace("\\\n", ""), re.M)
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command.replace("./diffusiongemma-26B-A4B-it", str(folder)))
        limit = [] if words[0] == "inspect" else ["--max-new-tokens", 8]
        code, _, error = run(*words, *limit, capsys=capsys)
        assert code == 0, f"{command}: {error}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "no JSON"),
        ('{"max_denoising_steps": "many"}', "must be a positive integer"),
        ('{"sampler_config": {"_cls_name": "Other", "entropy_bound": 0.3}}', "has no attribute 'Other'"),
        ('{"sampler_config": {"entropy_bound": 0.3}}', "cannot be read"),
        ('{"temperature": 0.5}', "temperature"),
        ('{"t_max": 0}', "its sampler cannot run so"),
    ],
)
def test_damaged_settings_are_refused_instead_of_replaced(copy, settings, message, capsys):
    (copy / "generation_config.json").write_text(settings)
    with pytest.raises(UnsupportedModel, match=f"generation_config.json: .*{message}"):
        load_writer(copy)
    code, _, error = run("generate", copy, "--prompt", "the cat", capsys=capsys)
    assert (code, error.count("\n")) == (2, 1)


def test_inspect_sees_that_weights_are_missing(copy):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({n: w for n, w in weights.items() if n != name}, copy / "model.safetensors", {"format": "pt"})
    found = inspect(copy)
    assert not found.loads
    assert "weights are missing" in found.problem
    with pytest.raises(UnsupportedModel, match="weights are missing"):
        load_writer(copy)


def test_damaged_checkpoints_are_refused(copy):
    (copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UnsupportedModel, match="its config and weights cannot be read"):
        load_writer(copy)

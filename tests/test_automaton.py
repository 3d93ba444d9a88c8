"""Constrained fills against enumeration: every string of a tiny vocabulary, its pattern, its room and its law."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from blockdiff.decode.automaton import (
    NEVER,
    Automaton,
    advance,
    best_fill,
    compile_pattern,
    sampled_fill,
    schema_pattern,
)
from blockdiff.decode.pieces import token_pieces
from blockdiff.tokenizer import train_tokenizer

pytest.importorskip("interegular")

END = 5
PIECES = ("a", "b", "ab", "ba", None, None)  # 4 is a control token, 5 ends a text
PATTERNS = ["(ab)*", "a*b+", "(a|b)*abb", "a{2,5}", "(a|b)*b?[^b]", "b?(ab|ba){1,2}a?", ".*"]
LLAMA = Path("/work/shared/models/stories260K")


def law(rows: int, slots: int, vocabulary: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, slots, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)


def spelled(tokens: tuple[int, ...]) -> str | None:
    """The text of these tokens, None where they are not a text: something after the end, or a control token."""
    ended = tokens.index(END) if END in tokens else len(tokens)
    if any(token != END for token in tokens[ended:]) or any(PIECES[token] is None for token in tokens[:ended]):
        return None
    return "".join(str(PIECES[token]) for token in tokens[:ended])


def matches(pattern: str, tokens: tuple[int, ...]) -> bool:
    text = spelled(tokens)
    return text is not None and re.fullmatch(pattern, text) is not None


def finishable(pattern: str, tokens: tuple[int, ...], room: int) -> bool:
    """Some continuation of at most `room` tokens makes the whole match."""
    return any(
        matches(pattern, tokens + more)
        for extra in range(room + 1)
        for more in itertools.product(range(4), repeat=extra)
    )


def allowed(
    pattern: str, log_p: Tensor, before: tuple[int, ...], given: list[int], used: list[bool], room: int
) -> dict[tuple[int, ...], float]:
    """Log-probability of every fill of one row [n, V] that fits, a given token being certain."""
    choices = [
        [0] if not used[at] else [given[at]] if given[at] >= 0 else range(log_p.shape[1]) for at in range(len(used))
    ]
    return {
        fill: sum(float(log_p[at, t]) for at, t in enumerate(fill) if used[at] and given[at] < 0)
        for fill in itertools.product(*choices)
        if finishable(pattern, before + tuple(t for t, u in zip(fill, used) if u), room)
    }


def start(automaton: Automaton, rows: int) -> Tensor:
    return torch.full((rows,), automaton.start)


def cases(
    pattern: str, rows: int, slots: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[tuple[int, ...]]]:
    """Laws, given tokens, used slots, room and texts before, of rows in which something fits."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for attempt in range(1000):
        log_p = law(1, slots, len(PIECES), seed * 1000 + attempt)[0]
        before = [(), (0,), (2,), (0, 1)][int(torch.randint(4, (1,), generator=generator))]
        given = torch.where(
            torch.rand(slots, generator=generator) < 0.3, torch.randint(len(PIECES), (slots,), generator=generator), -1
        )
        used = torch.arange(slots) < torch.randint(1, slots + 1, (1,), generator=generator)
        room = int(torch.randint(3, (1,), generator=generator))
        if allowed(pattern, log_p, before, given.tolist(), used.tolist(), room):
            found.append((log_p, given, used, room, before))
        if len(found) == rows:
            break
    assert len(found) == rows
    columns = list(zip(*found))
    return (
        torch.stack(columns[0]),
        torch.stack(columns[1]),
        torch.stack(columns[2]),
        torch.tensor(columns[3]),
        list(columns[4]),
    )


def states(automaton: Automaton, before: list[tuple[int, ...]]) -> Tensor:
    width = max(1, *map(len, before))
    tokens = torch.tensor([[*text, *[0] * (width - len(text))] for text in before])
    used = torch.arange(width) < torch.tensor([[len(text)] for text in before])
    return advance(automaton, start(automaton, len(before)), tokens, used)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_best_fill_is_the_enumerated_optimum(pattern: str) -> None:
    automaton = compile_pattern(pattern, PIECES, [END])
    log_p, given, used, room, before = cases(pattern, 12, 3, seed=1)
    tokens = best_fill(log_p, given, used, states(automaton, before), room, automaton)
    for row, text in enumerate(before):
        fits = allowed(pattern, log_p[row], text, given[row].tolist(), used[row].tolist(), int(room[row]))
        chosen = tuple(tokens[row].tolist())
        assert chosen in fits
        assert fits[chosen] == pytest.approx(max(fits.values()), abs=1e-9)
        assert bool((tokens[row] == given[row])[(given[row] >= 0) & used[row]].all())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sampled_fill_has_the_enumerated_law(pattern: str) -> None:
    automaton = compile_pattern(pattern, PIECES, [END])
    log_p, given, used, room, before = cases(pattern, 2, 3, seed=2)
    draws = 100_000
    log_p = (0.4 * log_p).log_softmax(-1)  # flat: what is likeliest of a kind is then far from all of its kind
    reached = states(automaton, before)
    for row, text in enumerate(before):
        fits = allowed(pattern, log_p[row], text, given[row].tolist(), used[row].tolist(), int(room[row]))
        total = math.log(sum(math.exp(worth) for worth in fits.values()))
        u = torch.rand(draws, 3, generator=torch.Generator().manual_seed(row), dtype=torch.float64)
        tokens = sampled_fill(
            log_p[row].expand(draws, -1, -1),
            given[row].expand(draws, -1),
            used[row].expand(draws, -1),
            reached[row].expand(draws),
            room[row].expand(draws),
            automaton,
            u,
        )
        seen, counts = torch.unique(tokens, dim=0, return_counts=True)
        share = {tuple(fill): count / draws for fill, count in zip(seen.tolist(), counts.tolist())}
        assert set(share) <= set(fits)
        apart = 0.5 * sum(abs(math.exp(worth - total) - share.get(fill, 0.0)) for fill, worth in fits.items())
        # of K outcomes: the mean is at most sqrt(K / 4 draws), and it strays by t with probability exp(-2 draws t^2)
        assert apart < math.sqrt(len(fits) / (4 * draws)) + math.sqrt(math.log(1e6) / (2 * draws))


def test_a_draw_of_one_slot_follows_u_exactly() -> None:
    """One slot, a grid of u: the counts are the conditional law to within one step of the grid."""
    automaton = compile_pattern("a|b|ba", PIECES, [END])
    log_p, grid = law(1, 1, len(PIECES), 3), 1000
    u = (torch.arange(grid, dtype=torch.float64)[:, None] + 0.5) / grid
    free, used = torch.full((grid, 1), -1), torch.ones(grid, 1, dtype=torch.bool)
    tokens = sampled_fill(
        log_p.expand(grid, -1, -1),
        free,
        used,
        start(automaton, grid),
        torch.zeros(grid, dtype=torch.int64),
        automaton,
        u,
    )
    share = log_p[0, 0, [0, 1, 3]].softmax(-1)
    assert torch.allclose((tokens == torch.tensor([0, 1, 3])).double().mean(0), share, atol=1.01 / grid)


def test_a_draw_counts_all_that_may_follow_and_not_the_likeliest_only() -> None:
    """aa, ab and bb are as likely: two of three draws begin with a, where best continuations alone would say half."""
    automaton = compile_pattern("aa|ab|bb", ("a", "b"), [])
    side = 60
    u = torch.cartesian_prod(*[(torch.arange(side, dtype=torch.float64) + 0.5) / side] * 2)
    rows = len(u)
    free, used = torch.full((rows, 2), -1), torch.ones(rows, 2, dtype=torch.bool)
    room = torch.zeros(rows, dtype=torch.int64)
    law_ = torch.zeros(rows, 2, 2, dtype=torch.float64).log_softmax(-1)
    tokens = sampled_fill(law_, free, used, start(automaton, rows), room, automaton, u)
    seen, counts = torch.unique(tokens, dim=0, return_counts=True)
    assert seen.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert counts.tolist() == [rows // 3] * 3


def test_where_it_must_differ_from_what_is_not_constrained_and_from_greedy() -> None:
    """`ab|ba...`: the free optimum breaks the pattern, and taking each slot's best allowed token is not the best."""
    automaton = compile_pattern("aa|bb", ("a", "b"), [])
    log_p = torch.tensor([[[0.6, 0.4], [0.01, 0.99]]]).double().log()
    free, used, room = torch.full((1, 2), -1), torch.ones(1, 2, dtype=torch.bool), torch.tensor([0])
    loose = compile_pattern("[ab]*", ("a", "b"), [])
    assert best_fill(log_p, free, used, start(loose, 1), room, loose).tolist() == [[0, 1]]
    best = best_fill(log_p, free, used, start(automaton, 1), room, automaton)
    assert best.tolist() == [[1, 1]]
    state, greedy = start(automaton, 1), []
    for at in range(2):
        one = best_fill(log_p[:, at : at + 1], free[:, :1], used[:, :1], state, torch.tensor([1 - at]), automaton)
        state = advance(automaton, state, one, used[:, :1])
        greedy.append(int(one))
    assert greedy == [0, 0]
    assert float(log_p[0, [0, 1], greedy].sum()) < float(log_p[0, [0, 1], best[0]].sum())


def test_given_tokens_to_the_right_decide_what_stands_to_their_left() -> None:
    automaton = compile_pattern("aa|bb", ("a", "b"), [])
    log_p = torch.tensor([[[0.999, 0.001], [0.999, 0.001]]]).double().log()
    given, used = torch.tensor([[-1, 1]]), torch.ones(1, 2, dtype=torch.bool)
    assert best_fill(log_p, given, used, start(automaton, 1), torch.tensor([0]), automaton).tolist() == [[1, 1]]


def test_room_is_respected() -> None:
    """After one token of `ab{3}` three more are needed; with room for fewer, no string fits."""
    automaton = compile_pattern("abbb|b", ("a", "b"), [])
    log_p = torch.tensor([[[0.9, 0.1]]]).double().log()
    free, used = torch.full((1, 1), -1), torch.ones(1, 1, dtype=torch.bool)
    assert best_fill(log_p, free, used, start(automaton, 1), torch.tensor([3]), automaton).tolist() == [[0]]
    assert best_fill(log_p, free, used, start(automaton, 1), torch.tensor([2]), automaton).tolist() == [[1]]


@pytest.mark.parametrize(
    ("pattern", "slots", "room", "given"), [("a{5}", 2, 2, -1), ("ab", 2, 5, 1), ("a", 2, 0, -1), ("a", 1, -1, -1)]
)
def test_what_cannot_be_met_is_an_error(pattern: str, slots: int, room: int, given: int) -> None:
    automaton = compile_pattern(pattern, ("a", "b"), [])
    arguments = (
        law(2, slots, 2, 0),
        torch.tensor([[given, *[-1] * (slots - 1)]]).expand(2, -1),
        torch.ones(2, slots, dtype=torch.bool),
        start(automaton, 2),
        torch.tensor([room, room]),
        automaton,
    )
    with pytest.raises(ValueError, match=r"cannot be met in the .* tokens that are left") as caught:
        best_fill(*arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be met"):
        sampled_fill(*arguments, torch.full((2, slots), 0.5, dtype=torch.float64))


def test_tokens_that_are_impossible_are_never_chosen() -> None:
    """A log-probability of -inf (top-k, top-p) is kept, at both ends of u."""
    automaton = compile_pattern(".*", ("a", "b", "c"), [])
    log_p = torch.tensor([[[-torch.inf, 0.0, -torch.inf]]]).double().expand(2, -1, -1)
    free, used, room = torch.full((2, 1), -1), torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 0])
    u = torch.tensor([[5e-324], [1 - 2**-53]], dtype=torch.float64)
    assert sampled_fill(log_p, free, used, start(automaton, 2), room, automaton, u).tolist() == [[1], [1]]


def test_the_automaton_of_tokens_is_that_of_their_text() -> None:
    for pattern in PATTERNS:
        automaton = compile_pattern(pattern, PIECES, [END])
        for slots in range(4):
            for tokens in itertools.product(range(len(PIECES)), repeat=slots):
                state = advance(
                    automaton,
                    start(automaton, 1),
                    torch.tensor([tokens], dtype=torch.int64).reshape(1, slots),
                    torch.ones(1, slots, dtype=torch.bool),
                )
                assert bool(automaton.accepting[state]) == matches(pattern, tokens), (pattern, tokens)
                if int(automaton.distance[state]) <= 2:
                    assert finishable(pattern, tokens, int(automaton.distance[state]))
                assert not int(automaton.distance[state]) or not finishable(
                    pattern, tokens, min(int(automaton.distance[state]), 3) - 1
                )


def test_classes_are_tokens_that_step_alike() -> None:
    automaton = compile_pattern("[ab]+c", ("a", "b", "c", "ac", "bc", None, "", "d"), [])
    a, b, c, ac, bc, control, empty, d = automaton.token_class.tolist()
    assert a == b
    assert ac == bc
    assert control == empty == d
    assert len({a, c, ac, d}) == 4 == automaton.step.shape[1]
    assert int(automaton.distance[-2]) == NEVER


def test_end_tokens_follow_a_match_only_and_nothing_follows_them() -> None:
    automaton = compile_pattern("ab?", PIECES, [END])
    dead, ended = len(automaton.step) - 2, len(automaton.step) - 1
    of = automaton.token_class[END]
    assert torch.equal(automaton.step[:dead, of] == ended, automaton.accepting[:dead])
    assert int(automaton.step[ended, of]) == ended
    assert bool((automaton.step[ended, automaton.token_class[:END]] == dead).all())
    assert bool(automaton.accepting[ended])
    assert int(automaton.distance[ended]) == 0


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "a{2,1}", r"(a)\1", r"a\b", "*"])
def test_a_bad_pattern_is_one_line(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern .* is not understood: .") as caught:
        compile_pattern(pattern, ("a", "b"), [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schema", ["{", '{"type": "wat"}', {"$ref": "#/nowhere"}, "[]"])
def test_a_bad_schema_is_one_line(schema: str | dict[str, str]) -> None:
    pytest.importorskip("outlines_core")
    with pytest.raises(ValueError, match=r"JSON schema: .") as caught:
        schema_pattern(schema)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["interegular", "outlines_core"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=rf"needs the package {package}; pip install 'blockdiff\[constrain\]'"):
        schema_pattern("{}") if package == "outlines_core" else compile_pattern(f"a|{time.time()}", ("a",), [])


@pytest.mark.parametrize("pattern", ["(?!.*bb)[ab]*", "a(?=b)b", "(?<=a)b", "a(?<!b)b"])
def test_looking_around_is_refused_because_the_library_gets_it_wrong(pattern: str) -> None:
    with pytest.raises(ValueError, match="lookahead and lookbehind are not supported"):
        compile_pattern(pattern, ("a", "b"), [])


@pytest.mark.parametrize(
    "pattern", [r"[(?=]", r"\(\?!", r"[]](?:a)", r"[^](?!]b", r"\[(?:a)", r"[]b]{2}", r"[^]b]", r"[\]b]", r"\[]"]
)
def test_brackets_are_read_as_python_reads_them(pattern: str) -> None:
    letters = "ab()?=![]"
    automaton = compile_pattern(pattern, tuple(letters), [])
    for slots in (1, 2, 3):
        tokens = torch.cartesian_prod(*[torch.arange(len(letters))] * slots).reshape(-1, slots)
        state = advance(automaton, start(automaton, len(tokens)), tokens, torch.ones_like(tokens, dtype=torch.bool))
        for accepted, row in zip(automaton.accepting[state].tolist(), tokens.tolist()):
            text = "".join(letters[token] for token in row)
            assert accepted == bool(re.fullmatch(pattern, text)), text


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 3},
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}}},
        {"anyOf": [{"type": "null"}, {"type": "integer", "multipleOf": 2}]},
        {"allOf": [{"type": "string"}, {"const": "x"}]},
        {"type": "object", "properties": {"a": {"type": "integer"}}, "minProperties": 1},
    ],
)
def test_what_the_schema_says_and_the_pattern_would_not_is_refused(schema: dict[str, object]) -> None:
    pytest.importorskip("outlines_core")
    with pytest.raises(ValueError, match=r"JSON schema: .* cannot be asked for"):
        schema_pattern(schema)


def test_a_property_may_be_called_like_a_keyword() -> None:
    pytest.importorskip("outlines_core")
    assert "minimum" in schema_pattern({"type": "object", "properties": {"minimum": {"type": "integer"}}})


def test_a_pattern_that_no_token_can_write() -> None:
    with pytest.raises(ValueError, match="no text that this tokenizer can write"):
        compile_pattern("c+", PIECES, [END])


def test_anchors_around_the_whole_are_dropped() -> None:
    assert compile_pattern("^ab$", PIECES, []).accepting.sum() == 2
    escaped = compile_pattern(r"a\$", ("a", "$"), [])
    assert int(escaped.distance[0]) == 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    texts = ['{"name": "Zoë", "age": 12, "ok": true}', "the cat sat on the mat, naïve café déjà vu"] * 8
    return train_tokenizer(texts, 330)


def test_pieces_of_a_byte_level_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    pieces = token_pieces(tokenizer, len(tokenizer) + 3)
    assert pieces[-3:] == (None, None, None)
    assert all(pieces[token] is None for token in tokenizer.all_special_ids)
    assert any(piece is not None and piece.startswith(" ") and len(piece) > 1 for piece in pieces)
    for text in ("the cat, sat", '{"name":  "x"}\n\t'):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(str(pieces[token]) for token in ids) == text
    # the two bytes of a letter that is rare are two tokens, neither of which is text
    assert [pieces[token] for token in tokenizer.encode("ž", add_special_tokens=False)] == [None, None]
    assert sum(piece is None for piece in pieces[: len(tokenizer)]) >= 128 + 2


def test_pieces_of_a_sentencepiece_tokenizer_with_byte_fallback() -> None:
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁the",
        "the",
        "a",
        "▁a",
        "▁▁",
        "é",
    ]
    core = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    pieces = token_pieces(tokenizer, len(words))
    assert pieces[259:] == (" ", " the", "the", "a", " a", "  ", "é")
    assert pieces[:3] == (None, None, None)
    assert pieces[3 + 0x0A] == "\n"
    assert pieces[3 + 0x41] == "A"
    assert pieces[3 + 0xC3] is None


@pytest.mark.skipif(not LLAMA.exists(), reason="needs shared/models/stories260K")
def test_pieces_of_a_llama_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    pieces = token_pieces(tokenizer, len(tokenizer))
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    for name, piece in zip(names, pieces):
        if not name.startswith("<") or not name.endswith(">"):
            assert piece == name.replace("▁", " "), name
    ids = tokenizer.encode("Once upon a time, Tim", add_special_tokens=False)
    assert "".join(str(pieces[token]) for token in ids).strip() == "Once upon a time, Tim"


def filled(automaton: Automaton, vocabulary: int, rows: int, blocks: int, width: int, *, seed: int) -> list[list[int]]:
    """Texts of random blocks, drawn from left to right, the slots of a block in a random order."""
    generator = torch.Generator().manual_seed(seed)
    state, parts = start(automaton, rows), []
    used = torch.ones(rows, width, dtype=torch.bool)
    for block in range(blocks):
        log_p = law(rows, width, vocabulary, seed * 100 + block, scale=1.0)
        room = torch.full((rows,), width * (blocks - block - 1))
        given = torch.full((rows, width), -1)
        for slot in torch.randperm(width, generator=generator).tolist():
            u = torch.rand(rows, width, generator=generator, dtype=torch.float64)
            given[:, slot] = sampled_fill(log_p, given, used, state, room, automaton, u)[:, slot]
        state = advance(automaton, state, given, used)
        parts.append(given)
    assert bool(automaton.accepting[state].all())
    return torch.cat(parts, 1).tolist()


@pytest.mark.parametrize("pattern", [r"[a-z]+@[a-z]+\.(com|org)", r"\d{4}-(0[1-9]|1[0-2])-\d\d", r"(yes|no)( \w+)*\."])
def test_random_fills_match_the_pattern(pattern: str) -> None:
    tokenizer = byte_tokenizer()
    end = int(tokenizer.eos_token_id)
    automaton = compile_pattern(pattern, token_pieces(tokenizer, len(tokenizer)), [end])
    texts = filled(automaton, len(tokenizer), 6, 3, 8, seed=1)
    for tokens in texts:
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert re.fullmatch(pattern, text, re.ASCII), text


def test_random_fills_match_a_json_schema() -> None:
    pytest.importorskip("outlines_core")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer"},
            "ok": {"type": "boolean"},
            "kind": {"enum": ["cat", "dog"]},
        },
        "required": ["name", "age", "ok", "kind"],
    }
    tokenizer = byte_tokenizer()
    automaton = compile_pattern(
        schema_pattern(schema), token_pieces(tokenizer, len(tokenizer)), [int(tokenizer.eos_token_id)]
    )
    for tokens in filled(automaton, len(tokenizer), 6, 5, 16, seed=2):
        found = json.loads(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        assert set(found) == set(schema["properties"])  # type: ignore[call-overload]
        assert isinstance(found["name"], str)
        assert len(found["name"]) <= 6
        assert type(found["age"]) is int
        assert type(found["ok"]) is bool
        assert found["kind"] in ("cat", "dog")


def test_thousands_of_tokens_compile_in_seconds_and_once() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 "
    pieces = tuple("".join(word) for word in itertools.islice(itertools.product(letters, repeat=3), 5000))
    pattern = r"([a-z]{1,40} ){3}[0-9]{1,80}"
    began = time.perf_counter()
    automaton = compile_pattern(pattern, pieces, [0])
    assert len(automaton.step) > 200
    assert time.perf_counter() - began < 20
    assert compile_pattern(pattern, list(pieces), [0]) is automaton


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fills_on_a_gpu_are_those_on_the_processor() -> None:
    automaton = compile_pattern("b?(ab|ba){1,2}a?", PIECES, [END])
    log_p, given, used, room, before = cases("b?(ab|ba){1,2}a?", 8, 3, seed=4)
    u = torch.rand(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here = (log_p, given, used, states(automaton, before), room)
    there = tuple(tensor.cuda() for tensor in here)
    best = best_fill(*there, automaton)
    assert torch.equal(best.cpu(), best_fill(*here, automaton))
    assert torch.equal(sampled_fill(*there, automaton, u.cuda()).cpu(), sampled_fill(*here, automaton, u))
    assert torch.equal(
        advance(automaton, there[3], best, there[2]).cpu(), advance(automaton, here[3], best.cpu(), used)
    )
    assert automaton.to(best.device) is automaton.to(best.device)

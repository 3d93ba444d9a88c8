"""The engine: whatever shares a pass, a page or a moment with a request, its text is the one it has alone."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import TEXT

from blockdiff.decode import POLICIES, Sampling, parse
from blockdiff.engine import Engine, Limits, Request, generate
from blockdiff.engine import network as network_module
from blockdiff.engine.limits import bytes_per_token, limits_in, texts_of
from blockdiff.engine.network import Network, prepared
from blockdiff.engine.pages import OutOfPages, Pages, Table
from blockdiff.engine.ragged import Segment, Stack
from blockdiff.engine.stream import TextStream
from blockdiff.layout import Layout, TokenMap
from blockdiff.loading import load
from blockdiff.model import BlockDiffusionModel
from blockdiff.tokenizer import train_tokenizer

CONVENTIONS = [
    ("shift", "clean", "context_causal"),
    ("shift", "seed", "context_causal"),
    ("same", "clean", "context_causal"),
    ("same", "clean", "block_causal"),
    ("shift", "seed", "block_causal"),
]
TOKENIZER = train_tokenizer([TEXT], 300)
MANY = Limits(pages=600, page_size=3)


def model_of(*conventions: str, architecture: str = "llama", **changes: object) -> BlockDiffusionModel:
    conventions = conventions or CONVENTIONS[0]
    changes = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 1024, **changes}
    model = tiny.model(architecture, *conventions, **changes)
    model.tokenizer = TOKENIZER
    return model


def requests_of(seed: int, count: int, *, lossless: bool) -> list[Request]:
    """Requests of all kinds: lengths, block sizes, policies, temperatures, and prompts that begin alike."""
    draw = random.Random(seed)
    shared = tuple(draw.randrange(3, 250) for _ in range(20))
    ways = ["threshold(0.02)", "random + fixed(2)", "entropy + fixed(1)", "confidence + stability(1.0) + fixed(3)"]
    ways += ["threshold(0.05) + edit(0.5, post_steps=2)", "entropy + entropy_budget(0.5)"]
    requests = []
    for number in range(count):
        prompt = shared[: draw.randrange(0, 20)] + tuple(draw.randrange(3, 250) for _ in range(draw.randrange(1, 9)))
        sampling = Sampling(draw.choice([0.0, 1.0]), top_k=draw.choice([0, 9]))
        policy, block_size = parse(draw.choice(ways)), draw.choice([1, 2, 3, 5, 8])
        request = Request(prompt, draw.randrange(1, 22), block_size, policy, sampling)
        request = replace(request, seed=number, end_ids=draw.choice([(), (40, 41)]), stop=draw.choice([(), ("a",)]))
        if lossless and draw.random() < 0.4:
            request = replace(
                request, lossless=True, policy=POLICIES["one_step"] if draw.random() < 0.5 else parse(ways[0])
            )
        if draw.random() < 0.15:
            request = replace(request, lossless=False, stepwise=3, policy=parse("entropy + fixed(1)"))
        requests.append(request)
    return requests


def seen(output) -> tuple:
    return output.tokens, output.text, output.finish_reason, output.steps, output.blocks


# ---- one engine for all


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CONVENTIONS), st.integers(0, 2))
def test_requests_come_and_go_and_none_notices(seed, conventions, scarcity):
    """Random arrivals, cancellations and preemption: every text is that of the request alone."""
    model = model_of(*conventions)
    lossless = conventions == CONVENTIONS[0] or conventions == CONVENTIONS[1]
    requests = requests_of(seed, 12, lossless=lossless)
    expected = [seen(generate(model, [request])[0]) for request in requests]
    pages = [900, 60, 40][scarcity]
    engine = Engine(model, Limits(pages=pages, page_size=3, clean_tokens=7 + seed % 9, requests=9))
    draw, jobs, cancelled, told = random.Random(seed), {}, set(), {}
    waiting = list(enumerate(requests))
    while waiting or engine.busy:
        while waiting and draw.random() < 0.5:
            number, request = waiting.pop(0)
            told[number] = []
            jobs[number] = engine.add(request, told[number].append)
        if jobs and draw.random() < 0.08:
            number = draw.choice(list(jobs))
            engine.cancel(jobs[number])
            if jobs[number].output is None:
                cancelled.add(number)
        engine.step()
    for number, job in jobs.items():
        if number not in cancelled:
            assert seen(job.output) == expected[number]
            assert "".join(told[number]) == job.output.text
        else:
            assert job.output is None
    assert engine.pages.in_use == 0
    assert len(jobs) == 12


def test_scarce_memory_really_preempts():
    """The twin of the property above: with so few pages somebody is sent back, and still writes the same."""
    model = model_of()
    requests = [Request((5, 9, number), 30, 4, POLICIES["fixed_count"], Sampling(1.0), number) for number in range(6)]
    expected = [seen(output) for output in generate(model, requests)]
    engine = Engine(model, Limits(pages=30, page_size=3))
    jobs = [engine.add(request) for request in requests]
    while engine.busy:
        engine.step()
    assert [seen(job.output) for job in jobs] == expected
    assert engine.preemptions > 3
    assert engine.pages.in_use == 0


def test_who_came_first_is_served_first():
    model = model_of()
    engine = Engine(model, Limits(pages=24, page_size=4, sharing=False))
    jobs = [engine.add(Request((5, number), 20, 4, POLICIES["fixed_count"], seed=number)) for number in range(8)]
    finished = []
    while engine.busy:
        finished += [job.number for job in engine.step()]
    assert finished == sorted(finished)
    assert all(job.output is not None for job in jobs)


def test_limits_are_kept():
    """Requests at once, clean tokens a pass, and which pages are forgotten first."""
    model = model_of()
    engine = Engine(model, Limits(pages=200, page_size=4, requests=2, clean_tokens=5, sharing=False))
    for number in range(5):
        engine.add(Request(tuple(range(5, 25 + number)), 6, 3, POLICIES["fixed_count"]))
    running, read = [], []
    while engine.busy:
        before = engine.prompt_tokens
        engine.step()
        running.append(engine.running)
        read.append(engine.prompt_tokens - before)
    assert max(running) == 2
    assert engine.iterations > 5 * 20 / 2 / 5  # prompts of 20 in bits of 5, two at a time
    free = Engine(model, Limits(pages=200, page_size=4, sharing=False))
    for number in range(5):
        free.add(Request(tuple(range(5, 25 + number)), 6, 3, POLICIES["fixed_count"]))
    while free.busy:
        free.step()
    assert free.iterations < engine.iterations / 3


def test_what_was_unused_for_longest_is_forgotten_first():
    pages = Pages(4, 2)
    for tokens in ([1, 2], [3, 4], [5, 6]):
        table = Table()
        pages.reserve(table, 2)
        pages.write(0, torch.tensor(pages.slots(table, 0, 2)), torch.ones(2, 1, 1), torch.ones(2, 1, 1))
        table.written = 2
        pages.file(table, tokens)
        pages.release(table)
    again = Table()
    pages.adopt(again, [1, 2])  # used again: no longer the oldest
    pages.release(again)
    pages.reserve(Table(), 4)
    assert [pages.matched(tokens) for tokens in ([1, 2], [3, 4], [5, 6])] == [2, 0, 2]


def test_cancelled_requests_give_their_pages_back_at_once():
    model = model_of()
    engine = Engine(model, Limits(pages=100, page_size=4))
    job, other = (engine.add(Request((5, number), 200, 8, POLICIES["threshold"])) for number in range(2))
    for _ in range(5):
        engine.step()
    before = engine.pages.in_use
    engine.cancel(job)
    assert 0 < engine.pages.in_use < before
    engine.cancel(job)  # twice is once
    while engine.busy:
        engine.step()
    assert job.output is None
    assert seen(other.output) == seen(generate(model, [other.request])[0])


def test_a_request_that_never_fits_is_refused_before_it_is_served():
    engine = Engine(model_of(), Limits(pages=4, page_size=4))
    with pytest.raises(ValueError, match="the engine's memory holds 16; ask for less"):
        engine.add(Request((5,), 30, 4))
    assert not engine.busy


def test_memory_returns_after_a_thousand_requests():
    model = model_of(num_hidden_layers=1)
    engine = Engine(model, Limits(pages=64, page_size=4))
    draw = random.Random(0)

    def serve(count: int) -> None:
        for number in range(count):
            prompt = tuple(draw.randrange(3, 250) for _ in range(draw.randrange(1, 9)))
            engine.add(Request(prompt, draw.randrange(1, 9), 4, POLICIES["fixed_count"], seed=number))
            if engine.waiting > 20:
                engine.step()
        while engine.busy:
            engine.step()

    with prepared(model):
        serve(100)
        gc.collect()
        tensors = sum(type(thing) is torch.Tensor for thing in gc.get_objects())
        held = {layer: keys.data_ptr() for layer, keys in engine.pages.keys.items()}
        serve(1000)
    gc.collect()
    assert engine.pages.in_use == 0
    assert engine.pages.available == 64
    assert {layer: keys.data_ptr() for layer, keys in engine.pages.keys.items()} == held
    assert sum(type(thing) is torch.Tensor for thing in gc.get_objects()) <= tensors + 5


def test_thirty_two_requests_share_their_passes():
    model = model_of()
    requests = requests_of(3, 32, lossless=False)
    engine = Engine(model, MANY)
    jobs = [engine.add(request) for request in requests]
    while engine.busy:
        engine.step()
    passes = sum(max(1, job.output.forwards) for job in jobs)
    assert engine.iterations < passes / 4
    assert [seen(job.output) for job in jobs] == [seen(generate(model, [request])[0]) for request in requests]


def test_a_text_that_read_anothers_memory_would_be_another_text(monkeypatch):
    """The twin: texts of one pass, were the rows of an attention call to read the first one's keys and values."""
    model = model_of()
    requests = [Request((5, 9 + n, 7, 20 + n), 12, 4, POLICIES["fixed_count"]) for n in range(4)]
    alone = [seen(generate(model, [request])[0]) for request in requests]
    assert [seen(output) for output in generate(model, requests)] == alone
    right, stacked = Stack.of, []

    def wrong(stack: Stack, memory: torch.Tensor) -> torch.Tensor:
        found = right(stack, memory)
        stacked.append(stack.rows)
        return found[:1].expand_as(found)

    monkeypatch.setattr(Stack, "of", wrong)
    together = [seen(output) for output in generate(model, requests)]
    assert max(stacked) == 4
    assert together[0] == alone[0]
    assert together[1:] != alone[1:]


# ---- fused commits, pages, prefixes


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CONVENTIONS[1:]))
def test_fused_commits_are_separate_commits(seed, conventions):
    model = model_of(*conventions)
    requests = [replace(request, stepwise=0) for request in requests_of(seed, 4, lossless=False)]
    fused = generate(model, requests, limits=Limits(pages=600))
    separate = generate(model, requests, limits=Limits(pages=600, fused=False))
    assert [seen(output) for output in fused] == [seen(output) for output in separate]
    for one, other in zip(fused, separate, strict=True):
        assert other.commit_forwards == len(other.blocks) - 1
        assert one.commit_forwards in (0, other.commit_forwards)  # blocks of one token are read before the next opens
        assert one.positions == other.positions


def test_a_fused_commit_saves_its_pass():
    model = model_of("shift", "seed", "context_causal")
    request = Request((5, 9), 40, 8, POLICIES["fixed_count"])
    fused = Engine(model, MANY)
    fused.add(request)
    separate = Engine(model, replace(MANY, fused=False))
    separate.add(request)
    for engine in (fused, separate):
        while engine.busy:
            engine.step()
    assert separate.iterations == fused.iterations + 5  # the prompt, and a commit for each block but the last


@pytest.mark.parametrize("conventions", [CONVENTIONS[1], CONVENTIONS[3]])
def test_a_block_that_did_not_see_the_one_committed_with_it_would_be_another(conventions, monkeypatch):
    """The twin: one pass commits a block and opens the next, which reads what the pass itself has just written."""
    model = model_of(*conventions)
    request = Request((5, 9), 40, 8, POLICIES["fixed_count"])
    right = Segment.mask

    def wrong(segment: Segment, window: int | None, context: str, device: torch.device) -> torch.Tensor:
        mask = right(segment, window, context, device)
        mask = torch.ones(1, 1, segment.count, segment.reach, dtype=torch.bool) if mask is None else mask.clone()
        if segment.noisy:
            mask[..., max(1, segment.at - 8) : segment.at] = False
        return mask

    fused, separate = (generate(model, [request], limits=replace(MANY, fused=fused))[0] for fused in (True, False))
    assert seen(fused) == seen(separate)
    monkeypatch.setattr(Segment, "mask", wrong)
    blind = generate(model, [request], limits=MANY)[0]
    assert seen(blind) != seen(separate)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CONVENTIONS), st.integers(1, 7))
def test_pages_are_contiguous_memory(seed, conventions, page_size):
    """Small pages handed out at random give what one page for everything gives."""
    model = model_of(*conventions)
    requests = requests_of(seed, 4, lossless=conventions in CONVENTIONS[:2])
    whole = generate(model, requests, limits=Limits(pages=8, page_size=2048))
    draw = random.Random(seed)

    class Scattered(Pages):
        def _take(self, wanted):
            return super()._take(None)

        def _roomiest(self):
            return draw.choice([page for page in range(self.count) if self._free[page]])

    engine = Engine(model, Limits(pages=900, page_size=page_size))
    engine.pages = Scattered(900, page_size)
    jobs = [engine.add(request) for request in requests]
    while engine.busy:
        engine.step()
    assert [seen(job.output) for job in jobs] == [seen(output) for output in whole]


def test_a_wrong_slot_would_be_seen():
    """The twin: pages whose first slot is taken for another one."""
    model = model_of()
    requests = requests_of(1, 4, lossless=False)

    class Torn(Pages):
        def _take(self, wanted):
            return super()._take(None)

        def slots(self, table, start, count):
            found = super().slots(table, start, count)
            return [found[-1], *found[1:]] if start == 0 and count > 4 else found

    found = []
    for kind in (Pages, Torn):
        engine = Engine(model, Limits(pages=900, page_size=2))
        engine.pages = kind(900, 2)
        jobs = [engine.add(request) for request in requests]
        while engine.busy:
            engine.step()
        found.append([seen(job.output) for job in jobs])
    assert found[0] == [seen(output) for output in generate(model, requests)]
    assert found[1] != found[0]


def test_a_shared_prefix_is_read_once():
    model = model_of()
    draw = random.Random(0)
    prefix = tuple(draw.randrange(3, 250) for _ in range(400))
    requests = [Request((*prefix, 5 + n, 9), 6, 3, POLICIES["fixed_count"], Sampling(1.0), n) for n in range(8)]
    expected = [seen(generate(model, [request])[0]) for request in requests]
    for page_size in (16, 7):
        engine = Engine(model, Limits(pages=900, page_size=page_size))
        jobs = [engine.add(request) for request in requests]  # all at once: the others wait for the first
        while engine.busy:
            engine.step()
        assert [seen(job.output) for job in jobs] == expected
        whole = 400 // page_size * page_size
        assert engine.prompt_tokens == 402 + 7 * (402 - whole)
        last = engine.add(requests[3])  # the same again: all that was written of it, to the token
        while engine.busy:
            engine.step()
        assert seen(last.output) == expected[3]
        assert engine.prompt_tokens == 402 + 7 * (402 - whole) + 1
    alone = Engine(model, Limits(pages=900, sharing=False))
    for request in requests:
        alone.add(request)
    while alone.busy:
        alone.step()
    assert alone.prompt_tokens == 8 * 402  # twin


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CONVENTIONS), st.integers(1, 5))
def test_a_hit_is_a_miss(seed, conventions, page_size):
    """Texts that begin with another one's prompt and text, cut anywhere."""
    model = model_of(*conventions)
    draw = random.Random(seed)
    first = Request(tuple(draw.randrange(3, 250) for _ in range(12)), 11, 4, POLICIES["fixed_count"], Sampling(1.0))
    engine = Engine(model, Limits(pages=500, page_size=page_size))
    job = engine.add(first)
    while engine.busy:
        engine.step()
    whole = (*first.prompt, *job.output.tokens)
    for cut in (1, 3, 11, 14, 23):
        prompt = (*whole[:cut], *(draw.randrange(3, 250) for _ in range(draw.randrange(3))))
        again = engine.add(replace(first, prompt=prompt, seed=cut))
        while engine.busy:
            engine.step()
        assert seen(again.output) == seen(generate(model, [again.request])[0])
    assert engine.shared_tokens > 0


def test_pages_of_another_text_must_not_be_taken(monkeypatch):
    """The twin: were one token taken for another in the search, the text would be another one."""
    model = model_of()
    engine = Engine(model, Limits(pages=100, page_size=4))
    first = Request((5, 6, 7, 8, 20, 21, 22, 23, 30), 6, 3, POLICIES["fixed_count"])
    other = replace(first, prompt=(5, 6, 7, 9, 20, 21, 22, 23, 30))
    expected = seen(generate(model, [other])[0])
    engine.add(first)
    while engine.busy:
        engine.step()
    job = engine.add(other)
    while engine.busy:
        engine.step()
    assert seen(job.output) == expected
    adopt = Pages.adopt

    def careless(self, table, marks):
        return adopt(self, table, [8 if mark == 9 else mark for mark in marks])

    monkeypatch.setattr(Pages, "adopt", careless)
    job = engine.add(replace(other, seed=1))
    while engine.busy:
        engine.step()
    assert seen(job.output)[:2] != expected[:2]


class Ledger:
    """What pages must be, kept by hand: which text's tokens every slot holds."""

    def __init__(self, count: int, size: int) -> None:
        self.pages = Pages(count, size)
        self.texts: list[tuple[Table, list[int]]] = []

    def write(self, table: Table, tokens: list[int]) -> None:
        new = tokens[table.written :]
        slots = torch.tensor(self.pages.slots(table, table.written, len(new)), dtype=torch.int64)
        values = torch.tensor(new, dtype=torch.float64)[:, None, None]
        self.pages.write(0, slots, values, values)
        table.written = len(tokens)

    def check(self) -> None:
        for table, tokens in self.texts:
            if tokens:
                slots = self.pages.slots(table, 0, len(tokens))
                assert self.pages.keys[0][slots].flatten().tolist() == tokens
                assert self.pages.values[0][slots].flatten().tolist() == tokens
            run = [page + 1 for page in table.pages[:-1]] == table.pages[1:]
            assert run or not table.run
        held = {page for table, _ in self.texts for page in (*table.pages, *table.held)}
        assert self.pages.in_use == len(held)
        assert self.pages.free + len(held | set(self.pages._filed)) == self.pages.count


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(4, 30))
def test_pages_hold_what_was_written(seed, size, count):
    draw, ledger = random.Random(seed), Ledger(count, size)
    pages = ledger.pages
    for _ in range(60):
        action = draw.random()
        if action < 0.4 or not ledger.texts:
            tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 4 * size))]
            table = Table()
            found = pages.adopt(table, tokens)
            assert found <= len(tokens)
            try:
                pages.reserve(table, len(tokens))
            except OutOfPages:
                pages.release(table)
            else:
                ledger.write(table, tokens)
                pages.file(table, tokens)
                ledger.texts.append((table, tokens))
        elif action < 0.6:
            table, tokens = draw.choice(ledger.texts)
            more = tokens + [draw.randrange(3) for _ in range(draw.randrange(1, size + 2))]
            try:
                pages.reserve(table, len(more))
            except OutOfPages:
                continue
            ledger.write(table, more)
            tokens[:] = more
            pages.file(table, tokens)
        elif action < 0.75:
            table, tokens = draw.choice(ledger.texts)
            try:
                ledger.texts.append((pages.fork(table, len(tokens)), list(tokens)))
            except OutOfPages:
                continue
        else:
            table, tokens = ledger.texts.pop(draw.randrange(len(ledger.texts)))
            if draw.random() < 0.7:
                pages.file(table, tokens, ended=True)
            pages.release(table)
        ledger.check()
    for table, _ in ledger.texts:
        pages.release(table)
    assert pages.in_use == 0
    assert pages.available == count


def test_a_text_grows_beside_its_own_pages():
    pages = Pages(40, 4)
    tables = [Table() for _ in range(4)]
    for length in range(4, 33, 4):
        for table in tables:
            pages.reserve(table, length)
    assert sum(table.run for table in tables) >= 3  # each found a hole to grow into


# ---- what a piece may see


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(["causal", "all", "all but the seed"]), st.booleans())
def test_quick_masks_are_the_rule(at, count, sees, block_causal):
    """The masks of runs, written down at once, against the one rule of visibility."""
    noisy = sees == "all but the seed" or (sees == "all" and not block_causal)
    segment = Segment(Table(), at, count, noisy, sees)
    context = "block_causal" if block_causal else "context_causal"
    quick = segment.mask(None, context, torch.device("cpu"))
    rule = segment.visibility(context, torch.device("cpu")).dense(None)
    everything = torch.ones_like(rule)
    assert torch.equal(everything if quick is None else quick, rule)
    window = segment.mask(3, context, torch.device("cpu"))
    assert window is None or bool((window <= rule).all())
    if at + count > 3 and count > 1:
        assert window is not None


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "opt"]
)
def test_architectures_write_the_same_together_and_in_pieces(architecture):
    """Windows, soft caps, sinks, learned positions: prompts read in bits beside other requests."""
    positions = {"gpt2": "n_positions"}.get(architecture, "max_position_embeddings")
    model = tiny.model(architecture, *CONVENTIONS[0], vocab_size=len(TOKENIZER), **{positions: 128})
    model.tokenizer = TOKENIZER
    requests = [
        Request(tuple(range(5, 5 + length)), 14, size, parse("threshold(0.02)"), Sampling(1.0), seed=length)
        for length, size in ((1, 4), (17, 1), (30, 6), (8, 3))
    ]
    together = generate(model, requests, limits=Limits(pages=200, page_size=5, clean_tokens=9))
    for request, output in zip(requests, together, strict=True):
        assert seen(output) == seen(generate(model, [request])[0])


# ---- the record of the network


def engine_after(model: BlockDiffusionModel, request: Request) -> list[int]:
    return generate(model, [request])[0].tokens


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_the_record_gives_the_networks_numbers(architecture, monkeypatch):
    model = model_of(architecture=architecture)
    request = Request((5, 9, 11), 30, 5, POLICIES["fixed_count"], Sampling(1.0), seed=3)
    monkeypatch.setattr(network_module, "WARM_UP", 10**9)
    plain = engine_after(model, request)
    monkeypatch.setattr(network_module, "WARM_UP", 0)
    assert engine_after(model, request) == plain
    assert [record is not None for record in Network.of(model)._records.values()] == [True]
    with torch.no_grad():  # trained on: the record follows
        for parameter in model.parameters():
            parameter.mul_(1.3)
    changed = engine_after(model, request)
    monkeypatch.setattr(network_module, "WARM_UP", 10**9)
    assert engine_after(model, request) == changed != plain


def test_recording_says_nothing_of_its_own(monkeypatch):
    """transformers warns of the loss of a model without a head, which tracing asks for."""
    log, said = logging.getLogger("transformers.modeling_utils"), []
    monkeypatch.setattr(log, "callHandlers", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(log, "isEnabledFor", lambda level: level >= logging.WARNING)
    log.warning_once.cache_clear()
    monkeypatch.setattr(network_module, "WARM_UP", 0)
    model = model_of()
    engine_after(model, Request((5, 9), 8, 4, POLICIES["fixed_count"]))
    assert any(Network.of(model)._records.values())
    assert said == []
    log.warning_once.cache_clear()
    assert model.backbone.base_model.loss_function is not None
    assert ["loss_type" in text for text in said] == [True]


def test_a_path_that_depends_on_the_numbers_is_not_recorded(monkeypatch):
    """A mixture of experts chooses its way by its numbers: a record of one way would be wrong for others."""
    model = model_of(architecture="mixtral")
    request = Request((5, 9, 11), 30, 5, POLICIES["fixed_count"], Sampling(1.0), seed=3)
    monkeypatch.setattr(network_module, "WARM_UP", 10**9)
    plain = engine_after(model, request)
    monkeypatch.setattr(network_module, "WARM_UP", 0)
    assert engine_after(model, request) == plain


def test_a_record_does_not_keep_a_model_alive(monkeypatch):
    monkeypatch.setattr(network_module, "WARM_UP", 0)
    model = model_of()
    engine_after(model, Request((5, 9), 8, 4, POLICIES["fixed_count"]))
    assert any(Network.of(model)._records.values())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_record_follows_weights_that_are_replaced(monkeypatch):
    monkeypatch.setattr(network_module, "WARM_UP", 0)
    model = model_of()
    request = Request((5, 9, 11), 30, 5, POLICIES["fixed_count"], Sampling(1.0), seed=3)
    before = engine_after(model, request)
    layer = model.backbone.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 3)
    changed = engine_after(model, request)
    monkeypatch.setattr(network_module, "WARM_UP", 10**9)
    assert engine_after(model_copy(model), request) == changed != before


def model_copy(model: BlockDiffusionModel) -> BlockDiffusionModel:
    copy = model_of()
    copy.backbone.load_state_dict(model.backbone.state_dict())
    return copy


@pytest.mark.parametrize("tied", [False, True])
def test_after_decoding_a_model_trains_and_saves_as_before(tied, tmp_path):
    """The copies that decoding lays out for itself are its own."""
    models = [model_of(tie_word_embeddings=tied).float() for _ in range(2)]
    generate(models[0], [Request((5, 9), 40, 4, POLICIES["fixed_count"])])
    assert Network.of(models[0])._records
    gradients = []
    for model in models:
        tokens = TokenMap.from_layouts([[Layout(2, (4,))]])
        torch.autograd.backward(model(torch.arange(5, 11)[None], tokens)[:, :30].square().sum())
        gradients.append(torch.cat([p.grad.flatten() for p in model.backbone.parameters() if p.grad is not None]))
        assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert torch.equal(*gradients)
    models[0].save(tmp_path / "model")
    again = load(tmp_path / "model").backbone.state_dict()
    for name, tensor in models[1].backbone.state_dict().items():
        assert torch.equal(again[name], tensor)


def test_engines_in_two_threads_do_not_meet(monkeypatch):
    monkeypatch.setattr(network_module, "WARM_UP", 0)
    models = [model_of(), model_of(num_hidden_layers=2)]
    request = Request((5, 9, 11), 60, 5, POLICIES["fixed_count"], Sampling(1.0), seed=3)
    expected = [engine_after(model, request) for model in models]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda model: [engine_after(model, request) for _ in range(4)], models))
    assert found == [[own] * 4 for own in expected]


# ---- what callers do


def test_callbacks_may_cancel_and_raise():
    """They are called when an iteration is whole: nobody else's text suffers."""
    model = model_of()
    requests = [Request((5, 9, n), 24, 4, POLICIES["fixed_count"], seed=n) for n in range(4)]
    expected = [seen(generate(model, [request])[0]) for request in requests]
    engine, jobs = Engine(model, MANY), []
    heard = {"cancelled": 0, "raised": 0}

    def cancel(piece: str) -> None:
        heard["cancelled"] += 1
        engine.cancel(jobs[1])

    def once(piece: str) -> None:
        heard["raised"] += 1
        if heard["raised"] == 1:
            raise KeyError("a caller's own fault")

    for number, request in enumerate(requests):
        jobs.append(engine.add(request, {1: cancel, 2: once}.get(number)))
    raised = 0
    while engine.busy:
        try:
            engine.step()
        except KeyError:
            raised += 1
    assert (heard["cancelled"], raised) == (1, 1)
    assert jobs[1].output is None
    assert [seen(jobs[n].output) for n in (0, 2, 3)] == [expected[n] for n in (0, 2, 3)]
    assert engine.pages.in_use == 0


def test_particles_are_served_together_however_few_requests_may_run():
    model = model_of()
    request = Request((5, 9), 12, 4, POLICIES["self_rewarding_smc"], Sampling(1.0), seed=1)
    expected = seen(generate(model, [request])[0])
    for limits in (Limits(requests=1), Limits(requests=2, page_size=3), Limits(pages=60, page_size=3)):
        assert seen(generate(model, [request], limits=limits)[0]) == expected


@pytest.mark.parametrize(
    "name",
    [
        "self_rewarding_smc",
        "guided",
        "draft_then_refine",
        "adablock",
        "klass",
        "soft_masked",
        "remdm",
        "stability_weighted",
    ],
)
def test_special_policies_under_scarcity(name):
    """Particles, guidance, a second stage, planned blocks, memory of earlier steps: preempted, and still the same."""
    policy = POLICIES[name]
    model = model_of()
    requests = [Request((5, 9, n), 14, 4, policy, Sampling(1.0), seed=n) for n in range(5)]
    expected = [seen(generate(model, [request])[0]) for request in requests]
    engine = Engine(model, Limits(pages=14 * texts_of(model, requests[0]), page_size=3))
    jobs = [engine.add(request) for request in requests]
    while engine.busy:
        engine.step()
    assert [seen(job.output) for job in jobs] == expected
    assert engine.pages.in_use == 0
    assert engine.preemptions > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt2"])
def test_memory_is_reckoned_as_it_is_taken(architecture):
    """The bytes of a token are those of the pages once they are there, and limits follow them."""
    model = model_of(architecture=architecture)
    engine = Engine(model, Limits(pages=8, page_size=4))
    engine.add(Request((5, 9), 4, 2))
    while engine.busy:
        engine.step()
    taken = sum(memory.nbytes for memory in (*engine.pages.keys.values(), *engine.pages.values.values()))
    assert bytes_per_token(model) == taken // 32
    free = 8 * bytes_per_token(model) * model.context_length  # a quarter: two contexts
    assert limits_in(model, 64, free).pages * 16 == 2 * model.context_length
    assert limits_in(model, 64, 10 * free).pages * 16 == 20 * model.context_length
    assert limits_in(model, 64, free, 160).pages == 10


@pytest.mark.parametrize(("pages", "seed"), [(95, 11), (130, 1), (110, 0)])
def test_particles_that_were_put_back_take_no_pages_while_they_wait(pages, seed):
    """Several searches at once, with others between them, in too little memory: all of it comes back."""
    model, draw = model_of(), random.Random(seed)
    model.backbone.get_output_embeddings().weight.data.mul_(20)  # so sure of itself that particles are resampled
    search, plain = POLICIES["self_rewarding_smc"], POLICIES["fixed_count"]
    requests = []
    for n in range(10):
        tokens, size = draw.randrange(20, 50), draw.choice([1, 4]) if n < 4 else 4
        requests.append(Request((5, 9, n), tokens, size, plain if n < 4 else search, Sampling(2.0), seed=n))
    engine, jobs = Engine(model, Limits(pages=pages, page_size=3)), []
    while engine.busy or requests:
        for _ in range(min(draw.choice([0, 0, 0, 1, 3]), len(requests))):
            jobs.append(engine.add(requests.pop(0)))
        engine.step()
    assert engine.preemptions > 0
    assert engine.pages.in_use == 0
    assert all(job.output is not None for job in jobs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": (5, 10**6)}, "token 1000000 is none of the model's"),
        ({"prompt": (-1,)}, "token -1 is none"),
        ({"forbidden": (10**6,)}, "is none of the model's"),
        ({"given": (None, 10**6)}, "is none of the model's"),
        ({"seed": 2**63}, "does not fit 64 bits"),
    ],
)
def test_what_would_break_a_pass_is_refused_before(change, message):
    engine = Engine(model_of())
    with pytest.raises(ValueError, match=message):
        engine.add(replace(Request((5,), 4), **change))
    assert not engine.busy


@pytest.mark.parametrize("change", [{"requests": 0}, {"page_size": 0}, {"clean_tokens": 0}, {"pages": -1}])
def test_impossible_limits_are_refused(change):
    with pytest.raises(ValueError, match="limits"):
        Limits(**change)


def test_whole_texts_must_fit_the_memory():
    engine = Engine(model_of(), Limits(pages=8, page_size=4, text_pages=16))
    with pytest.raises(ValueError, match="the engine's memory holds 32"):
        engine.add(Request((5,), 4, 2))


def test_rotary_frequencies_that_follow_the_length_are_served_alone():
    """transformers chooses longrope's factors by the largest position of a pass: a neighbour's, were there one."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    factors |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4, "factor": 4.0}
    model = model_of(rope_parameters=factors, max_position_embeddings=128)
    requests = [Request((5,) * length, 12, 4, POLICIES["fixed_count"], seed=length) for length in (3, 90)]
    together = [seen(output) for output in generate(model, requests)]
    assert together == [seen(generate(model, [request])[0]) for request in requests]


# ---- text


@pytest.mark.parametrize("seed", range(6))
def test_text_piece_by_piece_is_the_whole_text(seed):
    """Long texts are decoded from where they were settled, and read as if decoded at once."""
    draw = random.Random(seed)
    known = TOKENIZER(TEXT)["input_ids"] * 6
    ids = [draw.randrange(len(TOKENIZER)) for _ in range(400)] if seed % 2 else known[:400]
    prompt, ids = tuple(ids[:5]), ids[5:]
    stream, shown, at = TextStream(TOKENIZER, prompt, ()), "", 0
    while at < len(ids):
        at += draw.randint(1, 9)
        stream.feed(ids[:at])
        shown += stream.new_text(final=at >= len(ids))
    lead, whole = (TOKENIZER.decode(list(part), skip_special_tokens=True) for part in (prompt, (*prompt, *ids)))
    text = whole[len(lead) :] if whole.startswith(lead) else TOKENIZER.decode(ids, skip_special_tokens=True)
    assert stream.text == shown == text

"""How varied texts are, in words (maximal runs without white space), whatever tokenizer wrote or judges them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams over all n-grams of the texts together (Li et al., arXiv 1510.03055); None without any."""
    found = [gram for text in texts for gram in ngrams(text.split(), n)]
    return len(set(found)) / len(found) if found else None


def repeated(texts: Sequence[str], n: int = 4) -> float | None:
    """Share of n-grams that stand earlier in the same text, mean over texts that have any; None without."""
    shares = []
    for text in texts:
        found = ngrams(text.split(), n)
        if found:
            shares.append(1 - len(set(found)) / len(found))
    return sum(shares) / len(shares) if shares else None


def self_bleu(texts: Sequence[str], n: int = 4) -> float | None:
    """Mean BLEU-n of each text against all others (Texygen, arXiv 1802.01886); None from fewer than two.

    A precision without a hit counts as half a hit (smoothing 2 of Chen & Cherry is kinder; none at all makes most of
    short texts 0). References are closest in length.
    """
    tokens = [text.split() for text in texts if text.split()]
    if len(tokens) < 2:
        return None
    counts = [[Counter(ngrams(words, order)) for words in tokens] for order in range(1, n + 1)]
    scores = [_bleu(number, tokens, counts) for number in range(len(tokens))]
    return sum(scores) / len(scores)


def _bleu(number: int, tokens: Sequence[Sequence[str]], counts: Sequence[Sequence[Counter[tuple[str, ...]]]]) -> float:
    logs = []
    for of_order in counts:
        own = of_order[number]
        total = sum(own.values())
        if not total:
            break
        hits = sum(
            min(count, max(other[gram] for at, other in enumerate(of_order) if at != number))
            for gram, count in own.items()
        )
        logs.append(math.log(max(hits, 0.5) / total))
    length = len(tokens[number])
    closest = min(
        (len(other) for at, other in enumerate(tokens) if at != number), key=lambda size: (abs(size - length), size)
    )
    return min(1.0, math.exp(1 - closest / length)) * math.exp(sum(logs) / len(logs))

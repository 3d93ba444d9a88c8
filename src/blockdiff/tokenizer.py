"""Train a tokenizer: byte-level BPE over words and single digits: any text encodes, and decodes back to itself."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END = "<|begin|>", "<|end|>"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `vocabulary` tokens; it puts a beginning token before every text.

    Every digit is a token of its own, so that numbers are written the same way wherever they stand.

    Raises ValueError if the vocabulary cannot hold the 256 bytes and the two special tokens.
    """
    if vocabulary < 258:
        raise ValueError(f"vocabulary of {vocabulary} tokens is too small; give at least 258 (256 bytes, begin, end)")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BEGIN, eos_token=END)

"""The network that speed is measured on where no checkpoint is given: a random Llama of 8 million parameters."""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from blockdiff.api import Model
from blockdiff.distributions import Fixed
from blockdiff.loading import attach, from_architecture
from blockdiff.model import Spec
from blockdiff.objectives import Alignment, Boundary

VOCABULARY = 4096
SMALL: dict[str, Any] = {
    "type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


def random_network(seed: int = 0) -> Any:
    """The network alone, as transformers builds it."""
    return from_architecture(copy.deepcopy(SMALL), VOCABULARY, seed=seed).eval()


def random_model(boundary: Boundary = "clean", seed: int = 0) -> Model:
    """The same network as a block diffusion model, with words that are numbers."""
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    spec = Spec(mask_id=VOCABULARY - 1, alignment=Alignment("shift", boundary), layout=Fixed(16), trained_length=1024)
    return attach(random_network(seed), tokenizer, spec=spec, model_class=Model)

"""The bodies of requests, as OpenAI's clients send them, and what of them is refused.

Every field that is known and not honoured is named here with the values that ask for nothing, so that nothing is
ignored silently; an unknown field is refused too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

_MOST = 2**31 - 1


def _only(reason: str, *neutral: Any) -> AfterValidator:
    """A field that may ask for nothing but what happens anyway."""

    def check(value: Any) -> Any:
        if value is not None and not any(value == one and type(value) in (type(one), int, float) for one in neutral):
            raise PydanticCustomError("unsupported", reason)
        return value

    return AfterValidator(check)


_PENALTY = _only("is not supported: a penalty would depend on the order in which tokens are filled; leave it at 0", 0)
_TOOLS = _only("is not supported: the model's answers are text only; leave it out", [])
_NO_PLACE = _only("is not supported: templates have no place for it")
_ORDER = "an honest value would need the alternatives at the step at which each token was filled, which are not kept"


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class DiffusionOptions(_Body):
    """Options of block diffusion. policy: a name of `blockdiff policies` or its parts; threshold: of a policy that has
    one; block_size: tokens denoised together (default: the checkpoint's); lossless: keep what the AR model would write;
    max_forwards: end the text after so many; top_k: draw from the k likeliest tokens (0: all); stream_drafts: also send
    the open block as it fills, in events of their own."""

    policy: str | None = Field(None, min_length=1, max_length=500)
    threshold: float | None = Field(None, ge=0, le=1)
    block_size: int | None = Field(None, ge=1, le=_MOST)
    lossless: bool = False
    max_forwards: int | None = Field(None, ge=1, le=_MOST)
    top_k: int = Field(0, ge=0, le=_MOST)
    stream_drafts: bool = False


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Sampled(_Body):
    """What both kinds of requests have in common."""

    model: str | None = Field(None, max_length=500, description="the name of the served model")
    temperature: float | None = Field(None, ge=0, le=100, description="0 is greedy; default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128, description="texts for each prompt; text i is drawn with seed + i")
    stop: (
        Annotated[str, Field(min_length=1, max_length=500)]
        | list[Annotated[str, Field(min_length=1, max_length=500)]]
        | None
    ) = Field(None, description="one text or up to 16 that end the answer before them")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    diffusion: DiffusionOptions | None = None
    user: str | None = Field(None, max_length=500, description="has no effect")
    frequency_penalty: Annotated[float | None, _PENALTY] = None
    presence_penalty: Annotated[float | None, _PENALTY] = None
    logit_bias: Annotated[
        dict[str, float] | None, _only("is not supported: a policy reads the model's own certainty; leave it out", {})
    ] = None

    @property
    def options(self) -> DiffusionOptions:
        return self.diffusion or DiffusionOptions()


class CompletionBody(_Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, a list of texts, token ids, or a list of those"
    )
    max_tokens: int | None = Field(None, ge=1, le=_MOST, description="default 16")
    echo: bool | None = None
    logprobs: Annotated[int | None, _only(f"above 0 is not supported: {_ORDER}; give 0", 0)] = None
    suffix: Annotated[str | None, _only("is not supported here: see `blockdiff infill`", "")] = None
    best_of: Annotated[int | None, _only("is not supported: ask for n texts and choose", 1)] = None


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="a text, or a list of text parts")
    name: Annotated[str | None, _NO_PLACE] = None
    refusal: Annotated[str | None, _NO_PLACE] = None  # this and the rest come back in an answer that is sent again
    audio: Annotated[Any | None, _NO_PLACE] = None
    function_call: Annotated[Any | None, _NO_PLACE] = None
    tool_calls: Annotated[list[Any] | None, _TOOLS] = None
    annotations: Annotated[list[Any] | None, _TOOLS] = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Body):
    type: Literal["text"]


class ChatBody(_Sampled):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(None, ge=1, le=_MOST, description="default: what the context has room for")
    max_completion_tokens: int | None = Field(None, ge=1, le=_MOST, description="newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, _only(f"above 0 is not supported: {_ORDER}", 0)] = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: Annotated[bool | None, _only("is not supported: nothing is stored", False)] = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, max_length=500, description="has no effect")
    prompt_cache_key: str | None = Field(None, max_length=500, description="has no effect")
    tools: Annotated[list[Any] | None, _TOOLS] = None
    tool_choice: Annotated[Any | None, _only("is not supported: the model's answers are text only", "none")] = None
    functions: Annotated[list[Any] | None, _TOOLS] = None
    generation_config: str | None = Field(None, max_length=20000, description="as `transformers chat` sends it (JSON)")


class LoadBody(_Body):
    """POST /load_model, which `transformers chat` asks before it begins."""

    model: str = Field(max_length=500)

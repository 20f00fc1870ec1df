"""What requests hold. Unknown fields are ignored; what breaks the schema is told as a list of errors, with the place of each."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from megalens.serve.limits import Limits, Refused

Temperature = Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Vector = list[float]
Asked = TypeVar("Asked", bound=BaseModel)


class Message(BaseModel):
    """One turn of a chat."""

    role: str
    content: str = ""
    channel: str | None = None


class Shared(BaseModel):
    """A text or a chat; ``messages`` win."""

    text: str | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    enable_thinking: bool | None = None

    @field_validator("text")
    @classmethod
    def _short_text(cls, value: str | None, info: ValidationInfo) -> str | None:
        return _at_most(value, info, "max_input_chars")

    @field_validator("messages")
    @classmethod
    def _few_messages(cls, value: list | None, info: ValidationInfo) -> list | None:
        return _at_most(value, info, "max_messages")


class Extract(Shared):
    """``/extract``; ``positions`` are an addition: None means all."""

    positions: list[int] | None = None

    @field_validator("positions")
    @classmethod
    def _few_positions(cls, value: list | None, info: ValidationInfo) -> list | None:
        return _at_most(value, info, "max_positions_per_request")


class Saying(BaseModel):
    """How explanations are chosen. ``seed``, ``k`` and ``search`` are additions.

    ``k``: so many samples beside the explanation, at the temperature, or at 1 where that is 0. A ``search`` needs no temperature.
    """

    temperature: Temperature = 0.7
    max_new_tokens: int = Field(200, ge=1)
    seed: Seed = 0
    k: int = Field(0, ge=0)
    search: str = "greedy"

    @field_validator("max_new_tokens")
    @classmethod
    def _few_tokens(cls, value: int, info: ValidationInfo) -> int:
        return _no_more(value, info, "max_new_tokens")

    @field_validator("search")
    @classmethod
    def _small_search(cls, value: str, info: ValidationInfo) -> str:
        most = _limit(info, "max_search")
        if len(value) > 100 or any(int(digits) > most for digits in re.findall(r"\d+", value)):
            raise PydanticCustomError("search_too_large", "No number of a search may be above {most} (max_search)", {"most": most})
        return value

    @field_validator("k")
    @classmethod
    def _few_samples(cls, value: int, info: ValidationInfo) -> int:
        return _no_more(value, info, "max_samples")


class Explain(Extract, Saying):
    """``/explain``."""

    reverse: bool = True
    stream: bool = False


class Describe(Saying):
    """``/describe``."""

    activations: list[Vector]
    stream: bool = False

    @field_validator("activations")
    @classmethod
    def _few_vectors(cls, value: list, info: ValidationInfo) -> list:
        return _at_most(value, info, "max_describe_batch", least=1)


class Description(BaseModel):
    """A text that somebody gives for an activation."""

    description: str

    @field_validator("description")
    @classmethod
    def _short_description(cls, value: str, info: ValidationInfo) -> str:
        return _at_most(value, info, "max_description_chars")


class ScoreAsked(Description):
    """``/score``."""

    activation: Vector


class CompareAsked(Saying):
    """``/compare``."""

    activation_a: Vector
    activation_b: Vector


class Completion(Shared):
    """``/completion``."""

    completion_tokens: int = Field(16, ge=1)
    temperature: Temperature = 0.7
    seed: Seed = 0
    stream: bool = False


class Edit(Shared, Description):
    """``/edit``: a text for the activation at a position, or for a vector."""

    position: int = -1
    activation: Vector | None = None


class Steer(Shared, Description):
    """``/steer``: the subject goes on with ``a + weight * (rebuild - a)`` in the place of ``a``."""

    position: int = -1
    weight: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)
    tokens: int = Field(20, ge=1)

    @field_validator("tokens")
    @classmethod
    def _few_tokens(cls, value: int, info: ValidationInfo) -> int:
        return _no_more(value, info, "max_completion_tokens")


class Samples(Shared, Saying):
    """``/samples``: several texts of one activation."""

    position: int = -1
    activation: Vector | None = None
    temperature: Temperature = 1.0
    k: int = Field(8, ge=1)


def read(kind: type[Asked], body: bytes, limits: Limits) -> Asked:
    """A request's body.

    Raises:
        Refused: it is no JSON, or not what the route asks for.
    """
    try:
        return kind.model_validate_json(body, context=limits)
    except ValidationError as error:
        found = json.loads(error.json(include_url=False))
        for each in found:
            each["loc"] = ["body", *each["loc"]]
            if len(json.dumps(each.get("input"))) > 500:  # nobody wants their megabytes back
                each["input"] = None
        raise Refused(422, found) from None


def _limit(info: ValidationInfo, name: str) -> int:
    return getattr(info.context, name)


def _at_most(value: Any, info: ValidationInfo, limit: str, least: int = 0) -> Any:
    most, unit, kind = _limit(info, limit), "characters", "string"
    if isinstance(value, list):
        unit, kind = "items", "list"
    length = 0 if value is None else len(value)
    if length > most:
        prefix = "string_" if kind == "string" else ""
        raise PydanticCustomError(
            f"{prefix}too_long",
            "{kind} should have at most {max_length} {unit} ({limit}), not {actual_length}",
            {"kind": kind.capitalize(), "max_length": most, "unit": unit, "limit": limit, "actual_length": length},
        )
    if value is not None and length < least:
        raise PydanticCustomError("too_short", "List should have at least {min_length} item", {"min_length": least})
    return value


def _no_more(value: int, info: ValidationInfo, limit: str) -> int:
    if value > (most := _limit(info, limit)):
        raise PydanticCustomError("less_than_equal", "Input should be less than or equal to {le} ({limit})", {"le": most, "limit": limit})
    return value

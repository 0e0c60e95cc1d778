"""
What the service sends, as pydantic models.

They accept every variant the service is known to send (its documentation shows some fields in several shapes). A field
of an unknown shape counts as missing, and unknown fields are kept, so an addition by the service breaks nothing. Only
an id is required. Everything is within :mod:`~airflow_provider_siliconflow.api.bounds`, so a :class:`Batch` can travel
as a trigger event or an XCom whatever the service sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from airflow_provider_siliconflow.api.answer_texts import json_in
from airflow_provider_siliconflow.api.bounds import MAX_STATUS, bounded
from airflow_provider_siliconflow.api.fields import (
    UNKNOWN_STATUS,
    Amount,
    Count,
    Errors,
    Id,
    Metadata,
    Moment,
    Name,
    OptionalCount,
    OptionalId,
    Reference,
    Status,
    Text,
    Window,
    as_object,
)
from airflow_provider_siliconflow.api.redaction import brief, redact_all, shown, shown_word, without_secrets

ModelT = TypeVar("ModelT", bound=BaseModel)


class BatchStatus(StrEnum):
    """Statuses the service documents or implies. A batch may carry one that is not listed here."""

    VALIDATING = "validating"
    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


#: The statuses a batch never leaves. Anything else, known or not, is pending.
TERMINAL_STATUSES = frozenset(
    {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)

#: Terminal statuses whose batch is dead: a new submission may replace it. ``completed`` and ``expired`` hold
#: rows that are paid for.
DEAD_STATUSES = frozenset({BatchStatus.FAILED, BatchStatus.CANCELLED})


class Outcome(StrEnum):
    """What became of one input row."""

    OK = "ok"
    ERROR = "error"
    INVALID = "invalid"
    EXPIRED = "expired"
    MISSING = "missing"


def judge(*, error_code: str | None, has_error: bool, status_code: int | None, has_answer: bool) -> Outcome:
    """
    Say what a result line means for its row.

    :param error_code: ``error.code`` as text, if any.
    :param has_error: whether ``error`` holds anything.
    :param status_code: ``response.status_code``, if given.
    :param has_answer: whether ``response.body.choices`` holds a choice.
    """
    if has_error:
        return Outcome.EXPIRED if error_code == "batch_expired" else Outcome.ERROR
    if status_code is not None and not 200 <= status_code < 300:
        return Outcome.ERROR
    return Outcome.OK if has_answer else Outcome.ERROR


class _Model(BaseModel):
    # What was wrong may lie beside a signed URL, and the text of a validation error ends up in logs.
    model_config = ConfigDict(
        extra="allow",
        populate_by_name=True,
        frozen=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show signed URLs without their query."""
        for name, value in super().__repr_args__():
            yield name, shown(value)


class _Bounded(_Model):
    """What the API answers. Unknown fields are kept, but only a few, and not much of each."""

    @model_validator(mode="before")
    @classmethod
    def _bound_unknown_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = _names_of(cls)
        if known.issuperset(data) and _other_names_of(cls).isdisjoint(data):
            return data
        # Under two names at once, the second would pass for an unknown field.
        doubles = [
            name for names in _aliases_of(cls) for name in [each for each in names if each in data][1:]
        ]
        kept = {name: value for name, value in data.items() if name in known and name not in doubles}
        unknown = [name for name in data if name not in known]
        for name in unknown[:_MOST_UNKNOWN_FIELDS]:
            value = redact_all(bounded(data[name], characters=4000))
            kept.setdefault(brief(str(name), MAX_STATUS), value)
        return kept


#: Fields this package does not know that are kept.
_MOST_UNKNOWN_FIELDS = 32


@cache
def _names_of(model: type[BaseModel]) -> frozenset[str]:
    """Return the names of a model's fields, and those under which the service sends them."""
    return frozenset(model.model_fields).union(*_aliases_of(model))


@cache
def _other_names_of(model: type[BaseModel]) -> frozenset[str]:
    """Return the names under which fields are sent only rarely."""
    return frozenset(name for names in _aliases_of(model) for name in names[1:])


@cache
def _aliases_of(model: type[BaseModel]) -> tuple[tuple[str, ...], ...]:
    """Return the names of each field that the service sends under several, the first of which counts."""
    aliases = (field.validation_alias for field in model.model_fields.values())
    return tuple(tuple(map(str, alias.choices)) for alias in aliases if isinstance(alias, AliasChoices))


class RequestCounts(_Bounded):
    """Progress of a batch in rows."""

    total: Count = 0
    completed: Count = 0
    failed: Count = 0


class Batch(_Bounded):
    """
    A batch as the service describes it. Times are epoch seconds.

    Answers without a status count as ``"unknown"``, which is pending. ``errors`` are the first 200 at most, without
    secrets; ``metadata`` is read in whichever form it comes.
    """

    id: Id = Field(validation_alias=AliasChoices("id", "batch_id"))
    status: Status = UNKNOWN_STATUS
    object: Name = "batch"
    endpoint: Name = None
    errors: Errors = None
    input_file_id: OptionalId = None
    completion_window: Window = None
    output_file_id: Reference = None
    error_file_id: Reference = None
    created_at: Moment = None
    in_progress_at: Moment = None
    expires_at: Moment = None
    finalizing_at: Moment = None
    completed_at: Moment = None
    failed_at: Moment = None
    expired_at: Moment = None
    cancelling_at: Moment = None
    cancelled_at: Moment = None
    request_counts: Annotated[RequestCounts, BeforeValidator(as_object)] = RequestCounts()
    metadata: Metadata = Field(default_factory=dict)
    file_name: Name = None

    @property
    def is_terminal(self) -> bool:
        """Whether the status will never change again."""
        return self.status in TERMINAL_STATUSES

    @property
    def is_dead(self) -> bool:
        """Whether the batch failed or was cancelled, so that its work may be submitted anew."""
        return self.status in DEAD_STATUSES

    @property
    def is_known_status(self) -> bool:
        """Whether the status is one this package knows."""
        return self.status in BatchStatus._value2member_map_

    @property
    def error_messages(self) -> list[str]:
        """``errors`` as plain sentences, whichever of its shapes it came in."""
        items = self.errors
        if isinstance(items, dict):
            items = items.get("data", [items])
        if items is None:
            return []
        return [brief(_as_sentence(item)) for item in (items if isinstance(items, list) else [items])]

    def to_json_dict(self) -> dict[str, Any]:
        """
        Return the batch as JSON types with signed URLs stripped of their query: safe for XCom, events and logs.

        It encodes as JSON, as MessagePack and for Postgres, whatever the service said.
        """
        data = self.model_dump(mode="json")
        return {
            key: without_secrets(value) if key == "metadata" else shown(value) for key, value in data.items()
        }


#: What stands for success in an ``error`` that reports none.
_SUCCESS_CODES = frozenset({"0", "200", "20000", "success", "ok"})
_SUCCESS_WORDS = frozenset({"", "success", "succeeded", "ok"})


def says_success(code: Any, message: Any) -> bool:
    """
    Whether a code and a message say that all is well, as ``20000`` and ``"Ok"`` do.

    :param code: ``None`` leaves it to the message, which must then say so.
    :param message: ``None`` or empty leaves it to the code, which must then say so.
    """
    word = "" if message is None else message.strip(" .!").lower() if isinstance(message, str) else None
    if word not in _SUCCESS_WORDS or isinstance(code, dict | list | bool):
        return False
    return bool(word) if code in (None, "") else str(code).lower() in _SUCCESS_CODES


def has_content(error: Any) -> bool:
    """
    Whether an ``error`` says that something went wrong.

    An object of empty fields stands for none, and so does one that reports success:
    ``{"code": 20000, "message": "Ok"}``.
    """
    if isinstance(error, dict):
        return any(error.values()) and not says_success(error.get("code"), error.get("message"))
    return bool(error) and not (isinstance(error, str) and says_success(None, error))


def _as_sentence(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and item.get("message"):
        where = f"line {item['line']}: " if item.get("line") is not None else ""
        code = f" ({item['code']})" if item.get("code") is not None else ""
        return f"{where}{item['message']}{code}"
    return json.dumps(item, ensure_ascii=False, default=str)


class UploadedFile(_Bounded):
    """A file in the account's store, kept for 30 days. ``bytes`` is its size."""

    id: Id
    object: Name = "file"
    bytes: OptionalCount = None
    created_at: Moment = Field(default=None, validation_alias=AliasChoices("created_at", "createdAt"))
    filename: Name = None
    purpose: Name = None
    line_count: OptionalCount = None


class Account(_Bounded):
    """The account behind a key. Amounts are strings in CNY, as the service sends them."""

    id: Text = ""
    name: Text = ""
    status: Text = ""
    balance: Amount = None
    charge_balance: Amount = Field(
        default=None, validation_alias=AliasChoices("chargeBalance", "charge_balance")
    )
    total_balance: Amount = Field(
        default=None, validation_alias=AliasChoices("totalBalance", "total_balance")
    )


#: How a row was asked: in a batch, or by itself. Result lines have a field ``route`` only for the latter.
ROUTE_BATCH, ROUTE_LIVE = "batch", "live"


class BatchResult(_Model):
    """
    One line of an output or error file: what became of the row ``custom_id``.

    ``response`` and ``error`` are as the service sent them, whatever their size; :attr:`error_code`,
    :attr:`error_message` and :attr:`finish_reason` are short, and without secrets. ``invalid`` is written by this
    provider: why the answer is not what the job asked for. ``route`` is ``"live"`` if the row was asked by itself, and
    otherwise ``None``.
    """

    custom_id: str
    id: str | None = None
    response: dict[str, Any] | None = None
    error: Any = None
    trace_id: str | None = None
    invalid: Any = None
    route: Any = None
    _parsed: Any = PrivateAttr(default=None)

    @property
    def body(self) -> dict[str, Any]:
        """The chat completion, or ``{}``."""
        body = (self.response or {}).get("body")
        return body if isinstance(body, dict) else {}

    @property
    def _choice(self) -> dict[str, Any]:
        choices = self.body.get("choices")
        return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}

    @property
    def _message(self) -> dict[str, Any]:
        message = self._choice.get("message")
        return message if isinstance(message, dict) else {}

    @property
    def outcome(self) -> Outcome:
        """``ok``, ``error``, ``invalid``, ``expired`` or, for a row without any result, ``missing``."""
        status = (self.response or {}).get("status_code")
        if self.error_code == Outcome.MISSING:
            return Outcome.MISSING
        outcome = judge(
            error_code=self.error_code,
            has_error=has_content(self.error),
            status_code=status if isinstance(status, int) else None,
            has_answer=bool(self._choice),
        )
        is_invalid = outcome is Outcome.OK and isinstance(self.invalid, str) and self.invalid
        return Outcome.INVALID if is_invalid else outcome

    @property
    def ok(self) -> bool:
        """Whether the row was answered, and its answer is what the job asked for."""
        return self.outcome is Outcome.OK

    @property
    def text(self) -> str | None:
        """The answer's text, or ``None`` where the row has none."""
        text = self._message.get("content")
        return text if isinstance(text, str) else None

    @property
    def reasoning(self) -> str | None:
        """What a reasoning model thought (``reasoning_content``), or ``None``."""
        reasoning = self._message.get("reasoning_content")
        return reasoning if isinstance(reasoning, str) else None

    @property
    def tool_calls(self) -> list[Any]:
        """The tools that the model calls, as the service sent them, or ``[]``."""
        calls = self._message.get("tool_calls")
        return calls if isinstance(calls, list) else []

    @property
    def finish_reason(self) -> str | None:
        """``stop``, ``length`` (the answer was cut), ... or ``None``."""
        reason = self._choice.get("finish_reason")
        return shown_word(reason, MAX_STATUS) if isinstance(reason, str) else None

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts as the service sent them, or ``{}``."""
        usage = self.body.get("usage")
        return usage if isinstance(usage, dict) else {}

    @property
    def error_code(self) -> str | None:
        """``error.code`` as text, or ``None``."""
        code = self.error.get("code") if isinstance(self.error, dict) else None
        return None if code is None else shown_word(_as_sentence(bounded(code)), MAX_STATUS)

    @property
    def error_message(self) -> str | None:
        """What the service said of a row that failed, or why its answer is invalid; else ``None``."""
        if has_content(self.error):
            return brief(_as_sentence(bounded(self.error)))
        return brief(self.invalid) if isinstance(self.invalid, str) and self.invalid else None

    @property
    def parsed(self) -> Any:
        """
        The answer as ``output_type``, for results that were read with one: a pydantic model or a JSON value.

        ``None`` if the row is not ok, or if its answer is not of that type.
        """
        return self._parsed

    def with_parsed(self, value: Any) -> Self:
        """Return this result with the answer as it was read."""
        self._parsed = value
        return self

    def parse(self, model: type[ModelT]) -> ModelT:
        """
        Read the answer's text as JSON into a pydantic model.

        JSON in a code fence, after thinking or with other text around it is found, see
        :func:`~airflow_provider_siliconflow.api.answer_texts.json_in`.

        :param model: the class to read into.
        :raises pydantic.ValidationError: the text is not JSON, or not of that shape.
        :raises ValueError: the row has no text.
        """
        if self.text is None:
            raise ValueError(
                f"row {self.custom_id!r} has no text to parse: {self.error_message or 'no answer'}"
            )
        try:
            return model.model_validate_json(self.text)
        except ValidationError:
            found = json_in(self.text)
            if found is None or found == self.text.strip():
                raise
        return model.model_validate_json(found)

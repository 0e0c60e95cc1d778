"""
What the service sends, as pydantic models.

They accept every variant the service is known to send (``siliconflow`` documents some fields in several
shapes) and keep fields they do not know, so that an addition on the other side breaks nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Self, TypeVar, cast

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)

from airflow_provider_siliconflow.api.redaction import brief, shown

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


class _Tolerant(_Model):
    """Takes a field of an unknown shape for one that is not there: it must not hide the object itself."""

    @model_validator(mode="wrap")
    @classmethod
    def _without_odd_fields(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as exc:
            odd = {error["loc"][0] for error in exc.errors() if error["loc"]}
            needed = {name for name, field in cls.model_fields.items() if field.is_required()}
            if not odd or odd & needed or not isinstance(data, dict):
                raise
            return handler({name: value for name, value in data.items() if name not in odd})


class RequestCounts(_Model):
    """Progress of a batch in rows."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @field_validator("total", "completed", "failed", mode="before")
    @classmethod
    def _null_is_zero(cls, value: Any) -> Any:
        return 0 if value is None else value


class Batch(_Tolerant):
    """A batch as the service describes it. Times are epoch seconds."""

    id: str = Field(min_length=1)
    status: str = Field(min_length=1)
    object: str = "batch"
    endpoint: str | None = None
    errors: Any = None
    input_file_id: str | None = None
    completion_window: str | int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int | float | None = None
    in_progress_at: int | float | None = None
    expires_at: int | float | None = None
    finalizing_at: int | float | None = None
    completed_at: int | float | None = None
    failed_at: int | float | None = None
    expired_at: int | float | None = None
    cancelling_at: int | float | None = None
    cancelled_at: int | float | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: dict[str, str] = Field(default_factory=dict)
    file_name: str | None = None

    @field_validator("request_counts", mode="before")
    @classmethod
    def _no_counts_yet(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("metadata", mode="before")
    @classmethod
    def _metadata_as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return {}
        return {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}

    @field_validator("output_file_id", "error_file_id", "file_name", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None

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
        """Return the batch as JSON types with signed URLs stripped of their query: safe for XCom and logs."""
        data = self.model_dump(mode="json")
        # The author's own metadata is no secret of the service.
        return {key: value if key == "metadata" else shown(value) for key, value in data.items()}


def has_content(error: Any) -> bool:
    """Whether an ``error`` says anything: beside an answer, an object of empty fields stands for none."""
    return any(error.values()) if isinstance(error, dict) else bool(error)


def _as_sentence(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and item.get("message"):
        where = f"line {item['line']}: " if item.get("line") is not None else ""
        code = f" ({item['code']})" if item.get("code") is not None else ""
        return f"{where}{item['message']}{code}"
    return json.dumps(item, ensure_ascii=False, default=str)


class UploadedFile(_Tolerant):
    """A file in the account's store, kept for 30 days. ``bytes`` is its size."""

    id: str = Field(min_length=1)
    object: str = "file"
    bytes: int | None = None
    created_at: int | float | None = Field(
        default=None, validation_alias=AliasChoices("created_at", "createdAt")
    )
    filename: str | None = None
    purpose: str | None = None
    line_count: int | None = None


class Account(_Tolerant):
    """The account behind a key. Amounts are strings in CNY, as the service sends them."""

    id: str = ""
    name: str = ""
    status: str = ""
    balance: str | None = None
    charge_balance: str | None = Field(
        default=None, validation_alias=AliasChoices("chargeBalance", "charge_balance")
    )
    total_balance: str | None = Field(
        default=None, validation_alias=AliasChoices("totalBalance", "total_balance")
    )

    @field_validator("id", "name", "status", "balance", "charge_balance", "total_balance", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value


class BatchResult(_Model):
    """
    One line of an output or error file: what became of the row ``custom_id``.

    ``response`` and ``error`` are as the service sent them.
    """

    custom_id: str
    id: str | None = None
    response: dict[str, Any] | None = None
    error: Any = None
    trace_id: str | None = None

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
        """``ok``, ``error``, ``expired`` or, for a row without any result, ``missing``."""
        status = (self.response or {}).get("status_code")
        if self.error_code == Outcome.MISSING:
            return Outcome.MISSING
        return judge(
            error_code=self.error_code,
            has_error=has_content(self.error),
            status_code=status if isinstance(status, int) else None,
            has_answer=bool(self._choice),
        )

    @property
    def ok(self) -> bool:
        """Whether the row was answered."""
        return self.outcome is Outcome.OK

    @property
    def text(self) -> str | None:
        """The answer's text, or ``None`` where the row has none."""
        text = self._message.get("content")
        return text if isinstance(text, str) else None

    @property
    def reasoning(self) -> str | None:
        """What a reasoning model thought (``reasoning_content``), or ``None``."""
        return cast("str | None", self._message.get("reasoning_content"))

    @property
    def finish_reason(self) -> str | None:
        """``stop``, ``length`` (the answer was cut), ... or ``None``."""
        return cast("str | None", self._choice.get("finish_reason"))

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts as the service sent them, or ``{}``."""
        usage = self.body.get("usage")
        return usage if isinstance(usage, dict) else {}

    @property
    def error_code(self) -> str | None:
        """``error.code`` as text, or ``None``."""
        code = self.error.get("code") if isinstance(self.error, dict) else None
        return None if code is None else str(code)

    @property
    def error_message(self) -> str | None:
        """What the service said of a row that failed, or ``None``."""
        return _as_sentence(self.error) if has_content(self.error) else None

    def parse(self, model: type[ModelT]) -> ModelT:
        """
        Read the answer's text as JSON into a pydantic model.

        A fenced block (three backquotes around the JSON) is taken out of its fence first.

        :param model: the class to read into.
        :raises pydantic.ValidationError: the text is not JSON, or not of that shape.
        :raises ValueError: the row has no text.
        """
        if self.text is None:
            raise ValueError(
                f"row {self.custom_id!r} has no text to parse: {self.error_message or 'no answer'}"
            )
        text = self.text.strip()
        if text.startswith("```") and text.endswith("```"):
            text = text[3:-3].partition("\n")[2].strip()
        return model.model_validate_json(text)

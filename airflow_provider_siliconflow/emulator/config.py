"""Settings of the emulated service, for the command line, tests and the control API."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from airflow_provider_siliconflow.emulator.prices import Price, read_prices

#: How metadata is shown: as it was given, not at all, null, as a JSON text, or as a list of pairs.
MetadataForm = Literal["object", "missing", "null", "text", "pairs"]

#: Chat models of the emulated account and the share of questions each answers correctly (see ``answers``).
DEFAULT_MODELS: dict[str, float] = {
    "deepseek-ai/DeepSeek-V3": 0.88,
    "deepseek-ai/DeepSeek-R1": 0.93,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": 0.82,
    "Qwen/QwQ-32B": 0.86,
    "Qwen/Qwen3-235B-A22B": 0.9,
    "Qwen/Qwen3-32B": 0.85,
    "Qwen/Qwen3-8B": 0.72,
    "Qwen/Qwen2.5-72B-Instruct": 0.8,
    "Qwen/Qwen2.5-32B-Instruct": 0.76,
    "Qwen/Qwen2.5-7B-Instruct": 0.62,
    "THUDM/GLM-4-32B-0414": 0.78,
    "THUDM/GLM-4-9B-0414": 0.64,
    "moonshotai/Kimi-K2-Instruct": 0.89,
}


@dataclass
class EmulatorConfig:
    """
    Behaviour of the emulated service.

    Durations in *service* seconds are divided by ``speed``. Durations in *wall* seconds are not, because they are the
    time for which a client sees something odd; they run on the service's clock, so ``advance`` shortens them.

    :param speed: how many times faster than the real service batches run.
    :param queue_seconds: service seconds a batch stays ``in_queue``.
    :param rows_per_second: rows one batch finishes per service second.
    :param finalizing_seconds: service seconds between the last row and ``completed``.
    :param cancelling_seconds: service seconds between ``cancelling`` and ``cancelled``.
    :param late_output_seconds: wall seconds a finished batch still shows no result files.
    :param late_error_seconds: wall seconds a finished batch still shows no error file; None means the same as
        ``late_output_seconds``.
    :param partial_output_seconds: wall seconds after its end for which the output file of a batch contains only the
        first half of its lines.
    :param settle_seconds: wall seconds after its end before a batch shows its counts; until then, while it runs
        too, ``settle_as`` is shown.
    :param settle_as: what is shown for the counts: ``"zeros"`` (total, 0, 0), ``"null"`` or ``"empty"`` (``{}``).
    :param list_lag_seconds: wall seconds before a new batch appears in the list; by its id it is found at once.
    :param list_oldest_first: the list begins with the oldest batch.
    :param list_limit: the list shows only this many batches, ignores ``after`` and ``limit`` and claims to be complete;
        0 is no limit.
    :param list_endless: pages are filled with new made-up batches, and each claims that there are more.
    :param list_metadata: how the list shows metadata.
    :param batch_metadata: how an answer about one batch shows metadata.
    :param clock_offset_seconds: added to every time that the service states, including the ``Date`` header and signed
        URLs; may be negative. The service itself still uses the correct time.
    :param url_ttl_seconds: wall seconds a signed result URL is valid.
    :param row_error_rate: share of rows (0 to 1) that fail with a 429 or 503 the first time they are run.
    :param invalid_rate: share of rows (0 to 1) whose answer, the first time they are run, is not JSON, has a field of
        the wrong type or lacks one; a row without JSON gets a refusal.
    :param truncated_rate: share of rows whose answer is then cut short, with the finish reason ``length``.
    :param empty_rate: share of rows whose answer is then empty.
    :param fenced_rate: share of rows whose answer then stands in a code fence.
    :param thinking_rate: share of rows whose answer then comes after thinking in ``<think>``.
    :param wrong_attempts: how often these shares can befall one row of a model; each time is drawn anew.
    :param thinking_tokens: tokens that a model which thinks spends on it, at most ``thinking_budget`` of the row and
        not bounded by ``max_tokens``; 0 is a sentence.
    :param cached_share: share (0 to 1) of the tokens of every prompt that come from the service's cache; usage then
        has ``prompt_tokens_details``.
    :param live_latency: wall seconds that an answer on ``/chat/completions`` takes.
    :param live_jitter: share (0 to 1) by which that time varies from body to body, to either side.
    :param live_rpm: requests per minute and model that are asked live; beyond it they are refused with 429; 0 is no
        limit.
    :param live_tpm: tokens per minute and model, prompt and answer, reserved when a request arrives; 0 is no limit.
    :param live_burst: seconds of these two limits that can be used at once, but always one request.
    :param live_retry_after: seconds that a live 429 states in ``Retry-After``; 0 leaves the header out.
    :param live_error_rate: share of rows (0 to 1) that fail with a 429 or 503 the first time they are asked live.
    :param prices: CNY per million tokens by model, as ``{"prompt": ..., "completion": ..., "cached_prompt": ...,
        "live": {...}}``, the last two optional; the bill is made of them.
    :param balance: charge balance in CNY; at or below zero batches and live requests are refused
        with 402.
    :param max_open_batches: a batch is refused with 429 while this many have not ended; 0 is no limit.
    :param missing_file_status: status, 404 or 400, that refuses a batch over an unknown file.
    :param keys: accepted API keys; empty accepts any key that does not begin with ``sk-invalid``.
    :param models: model id to skill (0 to 1), the share of known questions it answers correctly.
    :param batch_models: the models that batches take, others are refused with 20012; empty is all of ``models``.
    :param no_json_models: models whose rows fail with 20024 if they ask for JSON in ``response_format``.
    :param no_thinking_models: models whose rows fail with 20015 if they have ``enable_thinking``.
    :param answers: JSONL file of ``{"question": ..., "answer": ...}``; ``prompt`` or ``custom_id`` in place of
        ``question`` gives the whole answer to a prompt or a row.
    :param ignore_cursor: the list ignores ``after``, and always claims that there are more batches.
    :param flat_files: file calls answer a flat OpenAI-style object instead of the documented envelope.
    :param results_as_file_ids: ``output_file_id`` and ``error_file_id`` are file ids instead of signed URLs.
    :param max_file_bytes: upload limit in bytes.
    :param max_file_lines: upload limit in lines.
    :param kept_results: batches whose result files are kept on disk; others are written again on request.
    """

    speed: float = 1.0
    queue_seconds: float = 30.0
    rows_per_second: float = 50.0
    finalizing_seconds: float = 5.0
    cancelling_seconds: float = 5.0
    late_output_seconds: float = 0.0
    late_error_seconds: float | None = None
    partial_output_seconds: float = 0.0
    settle_seconds: float = 0.0
    settle_as: Literal["zeros", "null", "empty"] = "zeros"
    list_lag_seconds: float = 0.0
    list_oldest_first: bool = False
    list_limit: int = 0
    list_endless: bool = False
    list_metadata: MetadataForm = "object"
    batch_metadata: MetadataForm = "object"
    clock_offset_seconds: float = 0.0
    url_ttl_seconds: float = 30 * 86400.0
    row_error_rate: float = 0.0
    invalid_rate: float = 0.0
    truncated_rate: float = 0.0
    empty_rate: float = 0.0
    fenced_rate: float = 0.0
    thinking_rate: float = 0.0
    wrong_attempts: int = 1
    thinking_tokens: int = 0
    cached_share: float = 0.0
    live_latency: float = 0.2
    live_jitter: float = 0.0
    live_rpm: int = 0
    live_tpm: int = 0
    live_burst: float = 1.0
    live_retry_after: float = 0.0
    live_error_rate: float = 0.0
    prices: dict[str, Price] = field(default_factory=dict)
    balance: float = 88.0
    max_open_batches: int = 0
    missing_file_status: Literal[400, 404] = 404
    keys: tuple[str, ...] = ()
    models: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_MODELS))
    batch_models: tuple[str, ...] = ()
    no_json_models: tuple[str, ...] = ()
    no_thinking_models: tuple[str, ...] = ()
    answers: Path | str | None = None
    ignore_cursor: bool = False
    flat_files: bool = False
    results_as_file_ids: bool = False
    max_file_bytes: int = 10**9
    max_file_lines: int = 5000
    kept_results: int = 64

    def __post_init__(self) -> None:
        for name in ("speed", "rows_per_second"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in _AT_LEAST_ZERO:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")
        if not math.isfinite(self.clock_offset_seconds):
            raise ValueError(
                f"clock_offset_seconds must be a number of seconds, not {self.clock_offset_seconds}"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(map(str, choices))
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        for name in ("row_error_rate", "cached_share", "live_jitter", "live_error_rate", *ANSWER_RATES):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.answer_rate > 1:
            added = " + ".join(name for name in ANSWER_RATES if getattr(self, name))
            raise ValueError(f"{added} must be 1 or less, not {self.answer_rate}")
        for model, skill in self.models.items():
            if not 0 <= skill <= 1:
                raise ValueError(f"the skill of model {model} must lie between 0 and 1, not {skill}")
        self.prices = read_prices(self.prices)
        for name in ("batch_models", "no_json_models", "no_thinking_models"):
            names = getattr(self, name)
            if isinstance(names, str):
                raise ValueError(f"{name} must be a list of models, not {names!r}")
            setattr(self, name, tuple(names))
            unknown = [one for one in names if one not in self.models]
            if unknown:
                raise ValueError(f"{name}: there is no model {unknown[0]!r}; known: {', '.join(self.models)}")
        if self.kept_results < 1:
            raise ValueError(f"kept_results must be 1 or more, not {self.kept_results}")

    @property
    def answer_rate(self) -> float:
        """The share of rows whose answer is not as it should be."""
        # Without the noise of sums such as 0.1 + 0.2 + 0.7.
        return math.fsum(getattr(self, name) for name in ANSWER_RATES)

    def changed(self, changes: Mapping[str, object]) -> EmulatorConfig:
        """
        Return a copy with the named fields replaced.

        :raises ValueError: an unknown field, or a value of the wrong type or range.
        """
        types = typing.get_type_hints(type(self))
        values: dict[str, typing.Any] = {}
        for name, value in changes.items():
            if name not in types:
                raise ValueError(f"there is no setting {name!r}; known: {', '.join(types)}")
            if name == "answers":
                raise ValueError("answers can only be given at the start")
            try:
                values[name] = msgspec.convert(value, types[name])
            except msgspec.ValidationError as error:
                raise ValueError(f"{name}: {error}") from None
        return dataclasses.replace(self, **values)


#: The settings that share out how answers are wrong.
ANSWER_RATES = ("invalid_rate", "truncated_rate", "empty_rate", "fenced_rate", "thinking_rate")
_AT_LEAST_ZERO = (
    "queue_seconds",
    "finalizing_seconds",
    "cancelling_seconds",
    "late_output_seconds",
    "late_error_seconds",
    "partial_output_seconds",
    "settle_seconds",
    "list_lag_seconds",
    "list_limit",
    "live_latency",
    "live_rpm",
    "live_tpm",
    "live_burst",
    "live_retry_after",
    "max_open_batches",
    "wrong_attempts",
    "thinking_tokens",
    "url_ttl_seconds",
)
#: The settings that take one of a few values.
CHOICES: dict[str, tuple[object, ...]] = {
    name: typing.get_args(hint)
    for name, hint in typing.get_type_hints(EmulatorConfig).items()
    if typing.get_origin(hint) is Literal
}

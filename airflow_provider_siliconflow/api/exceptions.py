"""
The errors of this package, by what a person can do about them.

Everything derives from :class:`SiliconFlowError`. A message says what happened, to which batch, whether
money was spent and what a retry will do, as far as the place that raises knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


class SiliconFlowError(Exception):
    """
    Root of all errors raised by this package.

    ``retryable`` says whether running the same task again, unchanged, can succeed: operators turn an error that
    is not retryable into ``AirflowFailException``. The class says what is usual; see :meth:`worth_a_retry`.
    """

    retryable = True

    def worth_a_retry(self, retryable: bool = True) -> Self:
        """Say for this one error, where its place knows better than its class, whether a retry can succeed."""
        self.retryable = retryable
        return self


class InvalidInputError(SiliconFlowError, ValueError):
    """An argument, a connection field or an input is wrong. Nothing was sent, nothing was spent."""

    retryable = False


class NoRowsError(InvalidInputError):
    """The input holds no rows, so there is nothing to run."""


@dataclass(frozen=True, slots=True)
class LineProblem:
    """
    One thing wrong with one row of an input.

    :param line: line number in the file, or position of the row in a list, counted from 1.
    :param reason: what is wrong and what would be right.
    :param custom_id: the row's ``custom_id`` where it could be read.
    """

    line: int
    reason: str
    custom_id: str | None = None

    def __str__(self) -> str:
        who = f" (custom_id {self.custom_id!r})" if self.custom_id is not None else ""
        return f"line {self.line}{who}: {self.reason}"


class InvalidRequestFileError(InvalidInputError):
    """
    Rows of the input are not valid requests; raised before anything is uploaded.

    :param source: the file or the name of the argument that held the rows.
    :param problems: what was found, at most the first 20.
    :param more: whether the search stopped there, so that there may be more.
    """

    def __init__(self, source: str, problems: Sequence[LineProblem], *, more: bool = False) -> None:
        self.source = source
        self.problems = tuple(problems)
        self.more = more
        count = f"the first {len(self.problems)} problems" if more else f"{len(self.problems)} problem(s)"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{source} is not a valid batch input, {count}; nothing was uploaded:\n{lines}")


class TransportError(SiliconFlowError):
    """No usable HTTP answer arrived: see the subclasses."""


class NotSentError(TransportError):
    """The request never reached the service: name resolution, connection or TLS failed."""


class NoAnswerError(TransportError):
    """The request may have reached the service, but its answer did not arrive (reset, or time ran out)."""


class UnexpectedAnswerError(TransportError):
    """An answer with a success status that is not what the API documents (HTML, cut JSON, no id)."""


class APIError(SiliconFlowError):
    """
    The service answered with an error.

    :param message: the service's message, shortened.
    :param status_code: HTTP status.
    :param code: the service's own code (``20012`` ...), where it gave one.
    :param trace_id: what the vendor's support asks for (header ``x-siliconcloud-trace-id``).
    :param retry_after: seconds the service asked to wait, where it did.
    :param call: method and path of the request, without its query.
    """

    #: What to do about it.
    hint = ""

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        code: int | str | None = None,
        trace_id: str | None = None,
        retry_after: float | None = None,
        call: str = "",
    ) -> None:
        self.message = message
        self.status_code = status_code
        self.code = code
        self.trace_id = trace_id
        self.retry_after = retry_after
        self.call = call
        parts = [f"HTTP {status_code}"]
        if code is not None:
            parts.append(f"code {code}")
        if trace_id:
            parts.append(f"trace id {trace_id}")
        #: What happened, without the hint: that is about the API, and a storage answers with errors as well.
        self.summary = f"{call or 'request'} was refused ({', '.join(parts)}): {message}"
        stop = "." if self.hint and self.summary[-1:] not in ".!?。" else ""
        super().__init__(f"{self.summary}{stop} {self.hint}".rstrip())


class InvalidRequestError(APIError):
    """400, 413, 422: the service does not accept the request as it is."""

    retryable = False
    hint = "Nothing was created; the same request would be refused again: change what the message names."


class AuthenticationError(APIError):
    """401: the API key is not known to this host."""

    retryable = False
    hint = (
        "Check the connection's password (the API key) and host: accounts of api.siliconflow.cn and "
        "api.siliconflow.com are separate and their keys are not interchangeable."
    )


class InsufficientBalanceError(APIError):
    """402 (or code 30001): the account cannot pay. Batches are paid from the charged balance only."""

    retryable = False
    hint = "Batches are paid from the charged balance only: charge the account."


class PermissionDeniedError(APIError):
    """403: the key may not do this, or the model is disabled."""

    retryable = False
    hint = "Check at the console what this API key may do, and whether the model is enabled for the account."


class NotFoundError(APIError):
    """404: no such batch, file or path on this account."""

    retryable = False
    hint = (
        "Check the id, and that it belongs to the account and the host (with its /v1) of this connection; files "
        "and results are kept for 30 days."
    )


class RateLimitedError(APIError):
    """429: refused before any work was done."""

    hint = "Nothing was created; the same request will be taken a while later."


class ServiceUnavailableError(APIError):
    """408, 425, 5xx: the service or something before it failed; what became of the request may be open."""

    hint = "The fault is not the request's, and usually passes."


class SubmissionUnknownError(SiliconFlowError):
    """
    A batch was asked for and it is open whether it exists.

    Not retryable by itself: posting again might pay twice. Look the batch up first.
    """

    retryable = False


class CredentialLeakError(SiliconFlowError):
    """A request would have carried the API key to a host other than the connection's own; not sent."""

    retryable = False


class BatchError(SiliconFlowError):
    """
    A batch ended, or was left, in a way the caller has to know of.

    :param message: the whole story.
    :param batch_id: the batch.
    """

    def __init__(self, message: str, *, batch_id: str | None = None) -> None:
        super().__init__(message)
        self.batch_id = batch_id


class BatchFailedError(BatchError):
    """The service rejected the batch, or not one of its rows succeeded."""


class BatchExpiredError(BatchError):
    """The completion window ended before the rows did; the finished ones can be downloaded."""


class BatchCancelledError(BatchError):
    """Somebody cancelled the batch."""


class BatchPartialFailureError(BatchError):
    """More rows failed than the author allows."""

    retryable = False


class BatchTimeoutError(BatchError):
    """The wait ended before the batch did. The batch is untouched unless the message says otherwise."""


class BatchCancelledAtTimeoutError(BatchTimeoutError):
    """The wait ended before the batch did, and the batch was cancelled, as ``cancel_on_timeout`` wants it."""


class BatchWaitError(BatchError):
    """The wait could not go on (401, 403, 404). The batch is untouched."""

    retryable = False


class IncompleteResultsError(BatchError):
    """Results do not hold what the batch's own counts promise, or could not be read whole."""

"""
The errors of this package, by what a person can do about them.

Everything derives from :class:`SiliconFlowError`::

    SiliconFlowError
      + InvalidInputError (also a ValueError)     nothing was sent
      | + NoRowsError
      | ' InvalidRequestFileError
      + TransportError                            no usable answer
      | + NotSentError
      | + NoAnswerError
      | ' UnexpectedAnswerError
      + APIError                                  the service answered with an error
      | + InvalidRequestError                     400, 413, 422
      | + AuthenticationError                     401
      | + InsufficientBalanceError                402, or code 30001
      | + PermissionDeniedError                   403
      | + NotFoundError                           404
      | + RateLimitedError                        429
      | ' ServiceUnavailableError                 408, 425, 5xx
      + SubmissionUnknownError                    a batch may or may not exist
      + JobTakenOverError                         a newer try of the task does the work
      + CredentialLeakError                       nothing was sent
      ' BatchError                                about one batch
        + BatchFailedError
        + BatchExpiredError
        + BatchCancelledError
        + BatchPartialFailureError
        + BatchTimeoutError
        | ' BatchCancelledAtTimeoutError
        + BatchWaitError
        ' IncompleteResultsError

Every constructor takes the keyword ``retryable``: whether running the same task again, unchanged, can succeed, where
the place that raises knows better than the class. Every error survives ``pickle`` and ``copy`` with its message,
attributes and notes. A message says what happened, to which batch, whether money was spent and what a retry does, as
far as the place that raises knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class SiliconFlowError(Exception):
    """
    Root of all errors raised by this package.

    :param args: the message.
    :param retryable: whether running the same task again, unchanged, can succeed: operators turn an error that is
        not retryable into ``AirflowFailException``. ``None`` leaves it to the class.
    """

    retryable: bool = True

    def __init__(self, *args: object, retryable: bool | None = None) -> None:
        super().__init__(*args)
        if retryable is not None:
            self.retryable = retryable

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild without the constructor, whose arguments are not kept."""
        state = dict(self.__dict__)
        if "__notes__" in state:
            # A copy gets further notes of its own.
            state["__notes__"] = list(state["__notes__"])
        return _rebuild, (type(self), self.args), state


def _rebuild(kind: type[SiliconFlowError], args: tuple[object, ...]) -> SiliconFlowError:
    return kind.__new__(kind, *args)


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
    :param retryable: as for :class:`SiliconFlowError`.
    """

    def __init__(
        self,
        source: str,
        problems: Sequence[LineProblem],
        *,
        more: bool = False,
        retryable: bool | None = None,
    ) -> None:
        self.source = source
        self.problems = tuple(problems)
        self.more = more
        count = f"the first {len(self.problems)} problems" if more else f"{len(self.problems)} problem(s)"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(
            f"{source} is not a valid batch input, {count}; nothing was uploaded:\n{lines}",
            retryable=retryable,
        )


class TransportError(SiliconFlowError):
    """
    No usable HTTP answer arrived: see the subclasses.

    :param args: the message.
    :param accepted: whether the service answered with a success status all the same, so that it may well have done
        what was asked: the same request must not be sent again.
    :param retryable: as for :class:`SiliconFlowError`.
    """

    def __init__(self, *args: object, accepted: bool = False, retryable: bool | None = None) -> None:
        super().__init__(*args, retryable=retryable)
        self.accepted = accepted


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
    :param retryable: as for :class:`SiliconFlowError`.
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
        retryable: bool | None = None,
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
        super().__init__(f"{self.summary}{stop} {self.hint}".rstrip(), retryable=retryable)


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


class JobTakenOverError(SiliconFlowError):
    """
    A newer try of the same task has taken the job over, and this one has stopped and changes nothing more.

    Nothing is lost: the newer try finds every batch that this one submitted. Retryable, since the newer try is one.
    """


class CredentialLeakError(SiliconFlowError):
    """A request would have carried the API key to a host other than the connection's own; not sent."""

    retryable = False


class BatchError(SiliconFlowError):
    """
    A batch ended, or was left, in a way the caller has to know of.

    :param message: the whole story.
    :param batch_id: the batch.
    :param retryable: as for :class:`SiliconFlowError`.
    """

    def __init__(self, message: str, *, batch_id: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message, retryable=retryable)
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

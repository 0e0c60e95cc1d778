"""How the emulated service refuses a request."""

from __future__ import annotations

from typing import Any

#: The real service's bodies by status; a string is sent as a JSON string.
DEFAULT_BODIES: dict[int, Any] = {
    400: {"code": 20015, "message": "Invalid parameter.", "data": None},
    401: "Invalid token",
    402: {"code": 30001, "message": "Sorry, your account balance is insufficient"},
    403: "Forbidden",
    404: "404 page not found",
    408: "Request Timeout",
    429: {
        "message": "Request was rejected due to rate limiting. Details: TPM limit reached.",
        "data": None,
    },
    500: {"code": 50000, "message": "Internal server error.", "data": None},
    503: {
        "code": 50505,
        "message": "Model service overloaded. Please try again later.",
        "data": "string",
    },
    504: "Gateway Timeout",
}


class ServiceError(Exception):
    """
    A refusal of the service.

    :param status: HTTP status.
    :param body: JSON body, an object or a bare string.
    """

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"{status} {body}")
        self.status = status
        self.body = body
        #: Headers of the answer beside the usual ones.
        self.headers: dict[str, str] = {}


def default_refusal(status: int) -> ServiceError:
    """Return a refusal with the body that the real service sends with its status."""
    return ServiceError(status, DEFAULT_BODIES[status])


def invalid_parameter(message: str) -> ServiceError:
    """Return the refusal of a request with a wrong parameter."""
    return ServiceError(400, {"code": 20015, "message": message, "data": None})


def unknown_model() -> ServiceError:
    """Return the refusal of a model that does not exist."""
    message = "Model does not exist. Please check it carefully."
    return ServiceError(400, {"code": 20012, "message": message, "data": None})


def rate_limited(limit: str) -> ServiceError:
    """Return the refusal over a rate limit, ``RPM`` or ``TPM``."""
    message = f"Request was rejected due to rate limiting. Details: {limit} limit reached."
    return ServiceError(429, {"message": message, "data": None})


def not_found() -> ServiceError:
    """Return the refusal of a path that does not exist."""
    return default_refusal(404)


def unknown_object(name: str, object_id: object, status: int = 404) -> ServiceError:
    """Return the refusal of an id that names nothing."""
    return ServiceError(
        status, {"code": 20015, "message": f"{name} {object_id} does not exist.", "data": None}
    )


def positive_number(value: str | int, name: str) -> int:
    """
    Read a query parameter.

    :raises ServiceError: 400, it is not an integer above 0.
    """
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise invalid_parameter(f"{name} must be a number above 0.")
    return number

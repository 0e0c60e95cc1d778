"""Signed result URLs, as an object storage issues and checks them."""

from __future__ import annotations

import calendar
import hmac
import time
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from airflow_provider_siliconflow.emulator.refusals import ServiceError

if TYPE_CHECKING:
    from collections.abc import Mapping


def signed_query(secret: str, path: str, now: float, seconds: float) -> str:
    """
    Return the query of a URL that works for a while.

    :param secret: key of the signature.
    :param path: path of the URL.
    :param now: the storage's clock in epoch seconds.
    :param seconds: time the URL is valid.
    """
    query = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        # Rounded up, so that a URL lives at least as long as it says.
        "X-Amz-Date": time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(-(-now // 1))),
        "X-Amz-Expires": str(int(-(-seconds // 1))),
    }
    query["X-Amz-Signature"] = _signature(secret, path, query["X-Amz-Date"], query["X-Amz-Expires"])
    return urlencode(query)


def check_query(secret: str, path: str, query: Mapping[str, str], now: float) -> None:
    """
    Check the query of a storage request.

    :raises ServiceError: 403, its body ``ExpiredToken`` or ``SignatureDoesNotMatch``.
    """
    date, expires = query.get("X-Amz-Date", ""), query.get("X-Amz-Expires", "")
    given = query.get("X-Amz-Signature", "")
    if not hmac.compare_digest(given.encode(), _signature(secret, path, date, expires).encode()):
        raise ServiceError(403, "SignatureDoesNotMatch")
    signed = calendar.timegm(time.strptime(date + "+0000", "%Y%m%dT%H%M%SZ%z"))
    if now > signed + float(expires):
        raise ServiceError(403, "ExpiredToken")


def _signature(secret: str, path: str, date: str, expires: str) -> str:
    return hmac.new(secret.encode(), f"{path}\n{date}\n{expires}".encode(), sha256).hexdigest()

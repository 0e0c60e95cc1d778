"""
The arguments of an operator: one table from name to reader, used when the DAG is parsed and when the task starts.

A reader gets the name of an argument and its value, as written in the DAG or as rendered by a template. It returns the
checked value, or raises :class:`~..api.exceptions.InvalidInputError` with the name in its message. When the DAG is
parsed, all values that are known then are read; when the task starts, all values are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from airflow_provider_siliconflow.api import arguments as checks
from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.output_types import (
    answer_type,
    check_accept,
    check_structured_output,
)
from airflow_provider_siliconflow.batch_files.parameters import (
    check_model_parameters,
    check_parameters,
    check_retry_parameters,
)
from airflow_provider_siliconflow.batch_files.prices import check_max_cost, check_prices
from airflow_provider_siliconflow.task.templating import (
    is_templated,
    is_templated_inside,
    rendered_list,
    rendered_mapping,
    rendered_number,
    rendered_seconds,
    rendered_text,
)

Reader = Callable[[str, Any], Any]


class Arguments:
    """
    The table of one operator.

    :param readers: readers by the names of the arguments.
    :param one_of: names of which exactly one must be given.
    :param not_both: names of which at most one may be given.
    :param needs: names of arguments that have no meaning without another one, with that one.
    :param never_rendered: names of arguments that are Python objects, known when the DAG is parsed.
    """

    def __init__(
        self,
        readers: Mapping[str, Reader],
        *,
        one_of: tuple[str, ...] = (),
        not_both: tuple[str, ...] = (),
        needs: Mapping[str, str] | None = None,
        never_rendered: Collection[str] = (),
    ) -> None:
        self._readers = dict(readers)
        self._one_of = one_of
        self._not_both = not_both or one_of
        self._needs = dict(needs or {})
        self._never_rendered = frozenset(never_rendered)

    def check(self, task: object) -> None:
        """
        Check the arguments that are known when the DAG is parsed.

        :param task: has the arguments as attributes.
        :raises InvalidInputError: an argument is wrong, whatever the templates render to.
        """
        for name in self._readers:
            value = getattr(task, name)
            if name in self._never_rendered:
                self._read(task, name)
                continue
            if is_templated(value):
                continue
            try:
                self._read(task, name)
            except InvalidInputError:
                # The error may come from a part that is not rendered yet.
                if not is_templated_inside(value):
                    raise
        if not any(is_templated(getattr(task, name)) for name in self._not_both):
            self._check_choice(task)
        self._check_needs(task)

    def read(self, task: object, *names: str) -> dict[str, Any]:
        """
        Read arguments when the task starts.

        :param task: has the rendered arguments as attributes.
        :param names: names of the arguments; all by default.
        :returns: their values by name.
        :raises InvalidInputError: an argument is wrong; nothing was sent.
        """
        if not names:
            self._check_choice(task)
        self._check_needs(task)
        return {name: self._read(task, name) for name in names or self._readers}

    def _read(self, task: object, name: str) -> Any:
        return self._readers[name](name, getattr(task, name))

    def _check_needs(self, task: object) -> None:
        for name, needed in self._needs.items():
            value = getattr(task, name)
            if is_templated(value) or rendered_text(value) is None:
                continue
            if rendered_text(getattr(task, needed)) is None:
                raise InvalidInputError(f"{name} has no meaning without {needed}; give both or neither")

    def _check_choice(self, task: object) -> None:
        given = [name for name in self._not_both if rendered_text(getattr(task, name)) is not None]
        if len(given) > 1:
            raise InvalidInputError(f"give either {' or '.join(self._not_both)}, not both")
        if self._one_of and not given:
            raise InvalidInputError(
                f"give {' or '.join(self._one_of)}. If it is templated, check that the upstream task pushed it."
            )


# Readers ------------------------------------------------------------------------------------------------------


def optional(reader: Reader) -> Reader:
    """Return a reader that reads no value, or a template that rendered to nothing, as ``None``."""

    def read(name: str, value: Any) -> Any:
        return None if rendered_text(value) is None else reader(name, value)

    return read


def seconds(name: str, value: Any) -> float:
    """Read a time in seconds: a number, a ``timedelta``, or the text of a number."""
    found = rendered_seconds(value)
    checks.check_seconds(name, found)
    return float(found)


def limit(name: str, value: Any) -> Any:
    """Read a limit of a job: a number, or the text of a number."""
    found = rendered_number(value)
    checks.check_limits(**{name: found})
    return found


def window(name: str, value: Any) -> str:
    """Read a completion window: ``"<n>h"``, a number of hours or a ``timedelta``."""
    return checks.check_completion_window(rendered_number(value))


def metadata(name: str, value: Any) -> dict[str, str]:
    """Read the metadata of batches that carry their identity."""
    return checks.check_metadata(rendered_mapping(value), identified=True)


def plain_metadata(name: str, value: Any) -> dict[str, str]:
    """Read the metadata of batches that carry no identity."""
    return checks.check_metadata(rendered_mapping(value))


def replace(name: str, value: Any) -> dict[str, Any] | None:
    """Read the parameters that override the body of every line."""
    return checks.check_replace(rendered_mapping(value))


def endpoint(name: str, value: Any) -> str:
    """Read the endpoint."""
    return checks.check_endpoint(value)


def prices(name: str, value: Any) -> Any:
    """Read prices by model."""
    found = rendered_mapping(value)
    check_prices(found)
    return found


def max_cost(name: str, value: Any) -> Any:
    """Read a sum in CNY: a number, or the text of a number."""
    found = rendered_number(value)
    check_max_cost(found)
    return found


def live_after(name: str, value: Any) -> checks.LiveAfter:
    """Read when open rows are asked one by one: seconds, a ``timedelta``, or a time with its zone."""
    return checks.check_live_after(name, rendered_seconds(value))


def concurrency(name: str, value: Any) -> int:
    """Read a number of requests, or the text of it."""
    return checks.check_concurrency(name, rendered_number(value))


def parameters(name: str, value: Any) -> Any:
    """Read body parameters for rows that lack them."""
    found = rendered_mapping(value)
    check_parameters(name, found)
    return found


def retry_parameters(name: str, value: Any) -> Any:
    """Read body parameters for rows that are sent again."""
    found = rendered_mapping(value)
    check_retry_parameters(name, found)
    return found


def output_type(name: str, value: Any) -> Any:
    """Read the type of the answers: a pydantic model class or a JSON schema. It is never rendered."""
    if value is not None:
        answer_type(name, value)
    return value


def accept(name: str, value: Any) -> Any:
    """Read a function that accepts answers."""
    check_accept(name, value)
    return value


def structured_output(name: str, value: Any) -> str | None:
    """Read how the service is asked for answers of a type."""
    return check_structured_output(name, value)


def model(name: str, value: Any) -> str | None:
    """Read one model."""
    found = checks.check_models(rendered_text(value), None)
    return found[0] if found else None


def models(name: str, value: Any) -> tuple[str, ...] | dict[str, Any] | None:
    """Read several models: a list of them, or a mapping of them to body parameters."""
    found = rendered_mapping(rendered_list(value))
    names = checks.check_models(None, found)
    if not isinstance(found, Mapping):
        return names or None
    check_model_parameters(name, found)
    return dict(zip(names, found.values(), strict=True))


def choice(*choices: str) -> Reader:
    """Return a reader of one of a few words."""
    return lambda name, value: checks.check_choice(name, value, choices)


def identifier(name: str, value: Any) -> str:
    """Read the id of a batch or a file."""
    return checks.check_identifier(name, value)


def identifiers(name: str, value: Any) -> list[str]:
    """Read one or more ids."""
    return checks.check_identifiers(name, rendered_list(value))


def place(name: str, value: Any) -> Any:
    """Read a path, a URI or a path object; it is only opened when it is used."""
    if value is None or (isinstance(value, str) and rendered_text(value) is None):
        raise InvalidInputError(
            f"{name} must be a path or URI; got {value!r}. If it is templated, check what it renders to."
        )
    return value


def rows(name: str, value: Any) -> Any:
    """Read rows: a path or URI of a file, a list, or what an upstream task returned."""
    found = rendered_list(value)
    if found is None:
        raise InvalidInputError(
            f"{name} must be rows or a path or URI of a file; got {value!r}. If it is templated, check that the "
            "upstream task pushed it."
        )
    return found


def on_clear(name: str, value: Any) -> str:
    """Read what a manual clear does to work that is paid for."""
    if value not in ("reuse", "resubmit"):
        raise InvalidInputError(f"{name} must be 'reuse' or 'resubmit'; got {value!r}")
    return str(value)


def text(name: str, value: Any) -> str:
    """Read a string that must not be empty."""
    if not isinstance(value, str) or rendered_text(value) is None:
        raise InvalidInputError(f"{name} must be a string that is not empty; got {value!r}")
    return value

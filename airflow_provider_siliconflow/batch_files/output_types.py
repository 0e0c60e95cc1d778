"""
What an answer must be: a pydantic model, or a JSON schema.

Imports nothing heavy: the arguments are checked when a DAG file is parsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from airflow_provider_siliconflow.api.exceptions import InvalidInputError
from airflow_provider_siliconflow.batch_files.parameters import to_json

if TYPE_CHECKING:
    import pydantic

    from airflow_provider_siliconflow.api.models import BatchResult

    #: A pydantic model class, or a JSON schema.
    OutputType: TypeAlias = type[pydantic.BaseModel] | Mapping[str, Any]
    #: Whether an answer is accepted; or why it is not.
    Accept: TypeAlias = Callable[[BatchResult], bool | str]

#: How the service is asked for answers of a type.
StructuredOutput = Literal["json_object", "json_schema", "prompt"]

#: Problems of one answer that are named.
_MOST_PROBLEMS = 3
_PROBLEM_CHARACTERS = 120

#: The column of an answer that has no fields.
_WITHOUT_FIELDS = ("parsed",)

NOT_JSON = "the answer is not JSON"
_TOO_DEEP = "the answer is nested too deeply"
_TOO_LARGE = "the answer has a number that is too large"
#: Characters of the longest answer that is read as a type, far above what a model writes. Each value that is wrong
#: takes memory, so longer ones could fill that of a worker.
_LONGEST_TEXT = 1 << 20


class UnacceptableAnswerError(ValueError):
    """An answer is not of the wanted type; the text says why."""


class AnswerType(Protocol):
    """
    Reads answers of one type.

    :param name: a short name for the service.
    :param schema: the JSON schema.
    :param fields: names of the fields of an answer; ``parsed`` alone if it has none.
    """

    name: str
    schema: dict[str, Any]
    fields: tuple[str, ...]

    def read(self, text: str) -> Any:
        """
        Read the text of an answer.

        :raises UnacceptableAnswerError: it is not of this type.
        """
        ...

    def values(self, parsed: Any) -> dict[str, Any]:
        """Return the fields of an answer that was read."""
        ...


class _ModelType:
    """Answers that are a pydantic model."""

    def __init__(self, model: type[pydantic.BaseModel], schema: dict[str, Any]) -> None:
        from pydantic import RootModel, ValidationError

        self.name = _slug(model.__name__)
        self.schema = schema
        self.fields = _WITHOUT_FIELDS if issubclass(model, RootModel) else tuple(model.model_fields)
        self._validate = model.model_validate_json
        self._refused = ValidationError

    def read(self, text: str) -> Any:
        _check_length(text)
        # Nearly all answers are JSON and nothing else, so they are parsed only once.
        try:
            return self._validate(text)
        except self._refused as exc:
            problem = exc
        from airflow_provider_siliconflow.api.answer_texts import json_in

        found = json_in(text)
        if found is None:
            raise UnacceptableAnswerError(NOT_JSON)
        if found != text.strip():
            try:
                return self._validate(found)
            except self._refused as exc:
                problem = exc
        problems = problem.errors(include_url=False, include_context=False, include_input=False)
        if problems[0]["type"] == "json_invalid":
            raise UnacceptableAnswerError(NOT_JSON)
        raise UnacceptableAnswerError(_story((each["loc"], each["msg"]) for each in problems))

    def values(self, parsed: Any) -> dict[str, Any]:
        found = parsed.model_dump()
        return {self.fields[0]: found} if self.fields is _WITHOUT_FIELDS else found


class _SchemaType:
    """Answers that satisfy a JSON schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        import jsonschema
        import msgspec
        from referencing import Registry, Resource
        from referencing.jsonschema import DRAFT202012

        from airflow_provider_siliconflow.batch_files.schema_checks import with_bounded_checks

        self.schema = dict(schema)
        self.name = _slug(str(schema.get("title") or "answer"))
        properties = schema.get("properties")
        self.fields = tuple(properties) if isinstance(properties, Mapping) else _WITHOUT_FIELDS
        kind = jsonschema.validators.validator_for(self.schema, jsonschema.Draft202012Validator)
        kind.check_schema(self.schema)
        kind = with_bounded_checks(kind)
        # With a registry of its own, a reference leads nowhere but into the schema: nothing is fetched.
        whole = Resource.from_contents(self.schema, default_specification=DRAFT202012)
        registry = Registry().with_resource(whole.id() or "", whole).crawl()
        resolver = registry.resolver(whole.id() or "")
        for reference in _references(self.schema):
            _follow(resolver, reference)
        self._find_problems = kind(self.schema, registry=registry).iter_errors
        # A schema that refers to itself for the same value raises RecursionError for every answer.
        samples: tuple[Any, ...] = ({}, [], "", 0, None)
        for value in samples:
            next(self._find_problems(value), None)
        self._decode = msgspec.json.Decoder().decode
        self._refused = (msgspec.DecodeError, ValueError)

    def read(self, text: str) -> Any:
        _check_length(text)
        try:
            value = self._value(text)
            problems = list(islice(self._find_problems(value), _MOST_PROBLEMS + 1))
        except RecursionError:
            raise UnacceptableAnswerError(_TOO_DEEP) from None
        except UnacceptableAnswerError:
            raise
        except (ArithmeticError, ValueError):
            # Python refuses to divide, and to show, integers of hundreds of digits.
            raise UnacceptableAnswerError(_TOO_LARGE) from None
        if problems:
            raise UnacceptableAnswerError(_story((each.absolute_path, _said(each)) for each in problems))
        return value

    def _value(self, text: str) -> Any:
        try:
            return self._decode(text)
        except self._refused:
            pass
        from airflow_provider_siliconflow.api.answer_texts import json_in

        try:
            return self._decode(json_in(text) or "")
        except self._refused:
            raise UnacceptableAnswerError(NOT_JSON) from None

    def values(self, parsed: Any) -> dict[str, Any]:
        if self.fields is _WITHOUT_FIELDS:
            return {self.fields[0]: parsed}
        return dict(parsed) if isinstance(parsed, dict) else {}


def _check_length(text: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise UnacceptableAnswerError(f"the answer has more than {_LONGEST_TEXT} characters")


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for name in ("$ref", "$dynamicRef"):
            if isinstance(reference := schema.get(name), str):
                yield reference
        schema = list(schema.values())
    if isinstance(schema, list | tuple):
        for part in schema:
            yield from _references(part)


def _follow(resolver: Any, reference: str) -> None:
    """
    Follow a reference to what it means.

    :raises Unresolvable: it leads nowhere.
    :raises RecursionError: it leads back to itself.
    """
    seen: set[str] = set()
    following: Any = reference
    while isinstance(following, str):
        if following in seen:
            raise RecursionError(f"the reference {following!r} leads back to itself")
        seen.add(following)
        found = resolver.lookup(following).contents
        following = found.get("$ref") if isinstance(found, Mapping) else None


def _said(problem: Any) -> str:
    """Say what is wrong without quoting the answer, so that equal problems read alike."""
    from airflow_provider_siliconflow.api.redaction import brief

    if problem.validator == "required":
        missing = [name for name in problem.validator_value if name not in problem.instance]
        return f"{', '.join(map(repr, missing))} is required"
    wanted = brief(to_json(problem.validator_value).decode(), _PROBLEM_CHARACTERS)
    return f"must satisfy {problem.validator}: {wanted}"


def _story(problems: Iterable[tuple[Iterable[Any], str]]) -> str:
    return "; ".join(_named(problems))


def _named(problems: Iterable[tuple[Iterable[Any], str]]) -> Iterator[str]:
    from airflow_provider_siliconflow.api.redaction import brief

    for number, (place, said) in enumerate(problems):
        if number == _MOST_PROBLEMS:
            yield "..."
            return
        # Positions in lists differ from answer to answer, and say nothing.
        where = ".".join("[]" if isinstance(part, int) else str(part) for part in place)
        yield brief(f"{where}: {said}" if where else said, _PROBLEM_CHARACTERS * 2)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:64].strip("-") or "answer"


def answer_type(name: str, value: OutputType) -> AnswerType:
    """
    Return the reader of answers of a type.

    :param name: the argument, for messages.
    :param value: a pydantic model class or a JSON schema.
    :raises InvalidInputError: it is anything else, or there is no JSON schema for it.
    """
    if isinstance(value, type) and callable(getattr(value, "model_json_schema", None)):
        try:
            schema: dict[str, Any] = value.model_json_schema()
            to_json(schema)
            return _ModelType(value, schema)
        # Pydantic has many errors for models without a schema, and a model may add its own.
        except Exception as exc:
            raise InvalidInputError(
                f"{name}: pydantic has no JSON schema for {value.__name__}: {exc}"
            ) from exc
    if not isinstance(value, Mapping):
        raise InvalidInputError(
            f"{name} must be a pydantic model class or a JSON schema (a dict); got {_shown(value)}"
        )
    try:
        to_json(value)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidInputError(f"{name} cannot be written as JSON: {exc}") from exc
    if not value:
        raise InvalidInputError(f"{name} is an empty schema, which every answer satisfies")
    from referencing.exceptions import Unresolvable

    try:
        return _SchemaType(value)
    except Unresolvable as exc:
        raise InvalidInputError(
            f"{name} has the reference {exc.ref!r}, which leads nowhere; put what it refers to into its $defs"
        ) from exc
    # A schema of an odd form raises errors of all kinds on the way.
    except Exception as exc:
        said = getattr(exc, "message", "") or str(exc)
        raise InvalidInputError(f"{name} is not a JSON schema: {said[:300]}") from exc


def _shown(value: Any) -> str:
    return f"an instance of {type(value).__name__}" if not isinstance(value, type) else value.__name__


def check_accept(name: str, value: Any) -> None:
    """
    Check a function that accepts answers.

    :raises InvalidInputError: it cannot be called.
    """
    if value is not None and not callable(value):
        raise InvalidInputError(
            f"{name} must be a function of a result that returns True, False or the reason why not; got "
            f"{type(value).__name__}"
        )


def check_structured_output(name: str, value: Any) -> StructuredOutput | None:
    """
    Check how the service is asked for answers of a type.

    :raises InvalidInputError: it is unknown.
    """
    if value is not None and value not in get_args(StructuredOutput):
        known = ", ".join(map(repr, get_args(StructuredOutput)))
        raise InvalidInputError(f"{name} must be one of {known}; got {value!r}")
    found: StructuredOutput | None = value
    return found

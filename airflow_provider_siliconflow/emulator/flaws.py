"""
How an answer is wrong: by a marker in the row, or as one of the share that the settings ask for.

A flaw is named as its marker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from airflow_provider_siliconflow.emulator.config import ANSWER_RATES
from airflow_provider_siliconflow.emulator.draws import digest_of, share_of
from airflow_provider_siliconflow.emulator.schemas import type_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_provider_siliconflow.emulator.config import EmulatorConfig
    from airflow_provider_siliconflow.emulator.schemas import SchemaWriter

_INVALID = ("not-json", "wrong-type", "missing-field")
#: The flaw of the rows that each of ``ANSWER_RATES`` stands for.
FLAW_BY_RATE = dict(zip(ANSWER_RATES, ("invalid", "length", "empty", "fenced", "thinking"), strict=True))
#: ``invalid`` is one of the next three, by row.
FLAWS = frozenset({*FLAW_BY_RATE.values(), *_INVALID})

_REFUSAL = "I am sorry, but I cannot answer that."
#: Tried in this order until one has no type that the schema allows. None is what a lenient reader makes fit.
_MISFITS: tuple[Any, ...] = ({"unexpected": True}, "not what was asked for", ["unexpected"], -1)


def drawn_flaw(custom_id: str, model: str, earlier: int, config: EmulatorConfig) -> str | None:
    """
    Return the flaw that the settings give a row, None if its answer is as it should be.

    :param earlier: how often the row was already answered wrongly. Each time is drawn anew.
    """
    if earlier >= config.wrong_attempts:
        return None
    drawn = share_of(digest_of(custom_id, model, b"flaw %d" % earlier))
    for setting, flaw in FLAW_BY_RATE.items():
        drawn -= getattr(config, setting)
        if drawn < 0:
            return flaw
    return None


def with_flaws(text: str, flaws: frozenset[str], number: int, writer: SchemaWriter | None) -> str:
    """
    Return an answer with the flaws that are not a matter of its length.

    :param number: decides which way it is wrong.
    :param writer: the schema the answer satisfies.
    """
    if "invalid" in flaws:
        flaws = flaws | {_INVALID[number % len(_INVALID)]}
    if "not-json" in flaws:
        text = _REFUSAL
    if "missing-field" in flaws:
        text = _changed(text, lambda value: _without_a_field(value, number, writer))
    if "wrong-type" in flaws:
        text = _changed(text, lambda value: _with_a_wrong_type(value, number, writer))
    if "fenced" in flaws:
        fenced = f"```json\n{text}\n```" if text[:1] in ("{", "[") else f"```\n{text}\n```"
        text = f"Here is the answer:\n\n{fenced}" if number & 1 else fenced
    if "thinking" in flaws:
        text = f'<think>\nIt might be {{"draft": true}}, but I had better check.\n</think>\n\n{text}'
    return text


def _changed(text: str, change: Callable[[Any], Any]) -> str:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return _REFUSAL
    return msgspec.json.encode(change(value)).decode()


def _without_a_field(value: Any, number: int, writer: SchemaWriter | None) -> Any:
    names = list(value) if isinstance(value, dict) else []
    if writer is not None:
        names = [name for name in names if name in writer.required()]
    if not names:
        return _with_a_wrong_type(value, number, writer)
    missing = names[number % len(names)]
    return {name: one for name, one in value.items() if name != missing}


def _with_a_wrong_type(value: Any, number: int, writer: SchemaWriter | None) -> Any:
    names = list(value) if isinstance(value, dict) else []
    for step in range(len(names)):
        name = names[(number + step) % len(names)]
        allowed = frozenset({type_of(value[name])}) if writer is None else writer.types(name)
        if allowed:
            return {**value, name: _misfit(allowed)}
    return _misfit((writer.types() if writer is not None else None) or frozenset({type_of(value)}))


def _misfit(allowed: frozenset[str]) -> Any:
    fitting = allowed | {"integer"} if "number" in allowed else allowed
    return next((one for one in _MISFITS if type_of(one) not in fitting), None)

"""HTML from the templates beside this file. All values are escaped, unless they are ``Markup``."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from .formats import count_text, date_text, p_text, percent, short_name, shortened


@cache
def _environment() -> Environment:
    # Resources, not paths: a DAG folder may be a zip file.
    folder = files(__package__) / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": count_text,
        "date": date_text,
        "p": p_text,
        "short": short_name,
        "cut": shortened,
        "owner": lambda model: model.rpartition("/")[0],
    }
    return environment


def render(template: str, **values: Any) -> str:
    """
    Return a page.

    :param template: name of a file in ``templates/``.
    """
    return _environment().get_template(template).render(**values)

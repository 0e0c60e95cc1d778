"""The connection form: one list of fields for all versions of Airflow."""

from __future__ import annotations

from typing import Any

CONN_TYPE = "siliconflow"

#: Fields kept in the connection's extra, in the form that Airflow 3.2+ reads from the provider's metadata.
CONN_FIELDS: dict[str, dict[str, Any]] = {
    "timeout": {
        "label": "Timeout (seconds)",
        "description": "How long to wait for the next bytes of an answer. Default 60.",
        "schema": {"type": ["number", "null"], "minimum": 1},
    },
    "connect_timeout": {
        "label": "Connect timeout (seconds)",
        "description": "How long to wait for a connection. Default 10.",
        "schema": {"type": ["number", "null"], "minimum": 1},
    },
    "max_retries": {
        "label": "Retries",
        "description": "How often a call that may safely be repeated is sent again. Default 7.",
        "schema": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
    },
    "proxies": {
        "label": "Proxy",
        "description": 'URL of an HTTP proxy, or JSON by scheme: {"https": "http://proxy:3128"}.',
        "schema": {"type": ["string", "null"]},
    },
    "verify": {
        "label": "Verify certificates",
        "description": "true, false or the path of a CA bundle, or of a folder of certificates. Default true.",
        "schema": {"type": ["string", "null"]},
    },
    # Airflow hides fields of the extra by name: those with "proxies" or "secret", but not "headers".
    "secret_headers": {
        "label": "Additional headers",
        "description": 'JSON object of headers for calls of the API: {"X-Team": "nlp"}.',
        "schema": {"type": ["string", "null"], "format": "password"},
    },
    "prices": {
        "label": "Prices (CNY per million tokens)",
        "description": 'JSON object by model: {"deepseek-ai/DeepSeek-V3": {"prompt": 1, "completion": 4}}.',
        "schema": {"type": ["string", "null"]},
    },
}


def ui_field_behaviour() -> dict[str, Any]:
    """Return how Airflow before 3.2 shows the standard fields of the form."""
    return {
        "hidden_fields": ["schema", "port", "login"],
        "relabeling": {"password": "API key", "host": "Base URL"},
        "placeholders": {
            "host": "https://api.siliconflow.cn/v1",
            "password": "sk-...",
        },
    }


def form_widgets() -> dict[str, Any]:
    """Return the additional fields in the form that Airflow before 3.2 needs."""
    from flask_appbuilder.fieldwidgets import BS3PasswordFieldWidget, BS3TextFieldWidget
    from wtforms import PasswordField, StringField

    widgets: dict[str, Any] = {}
    for name, field in CONN_FIELDS.items():
        secret = field["schema"].get("format") == "password"
        make, widget = (
            (PasswordField, BS3PasswordFieldWidget) if secret else (StringField, BS3TextFieldWidget)
        )
        widgets[name] = make(field["label"], description=field["description"], widget=widget())
    return widgets

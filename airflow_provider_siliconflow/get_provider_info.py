"""The metadata that Airflow reads about this provider when it starts. Imports nothing heavy."""

from __future__ import annotations

from typing import Any

from airflow_provider_siliconflow import __version__
from airflow_provider_siliconflow.hooks.connection_form import CONN_FIELDS, ui_field_behaviour

_PACKAGE = "airflow_provider_siliconflow"
_NAME = "SiliconFlow"


def get_provider_info() -> dict[str, Any]:
    """Return the provider's metadata (entry point ``apache_airflow_provider``)."""
    behaviour = {key.replace("_", "-"): value for key, value in ui_field_behaviour().items()}
    return {
        "package-name": "airflow-provider-siliconflow",
        "name": _NAME,
        "description": "Run LLM batches on `SiliconFlow <https://siliconflow.cn/>`__ at half the live price.",
        "versions": [__version__],
        "integrations": [
            {
                "integration-name": _NAME,
                "external-doc-url": "https://docs.siliconflow.cn/",
                "tags": ["ai"],
            }
        ],
        "hooks": [{"integration-name": _NAME, "python-modules": [f"{_PACKAGE}.hooks.siliconflow"]}],
        "operators": [
            {
                "integration-name": _NAME,
                "python-modules": [f"{_PACKAGE}.operators.batch"],
            }
        ],
        "sensors": [{"integration-name": _NAME, "python-modules": [f"{_PACKAGE}.sensors.batch"]}],
        "triggers": [{"integration-name": _NAME, "python-modules": [f"{_PACKAGE}.triggers.batch"]}],
        "connection-types": [
            {
                "hook-class-name": f"{_PACKAGE}.hooks.siliconflow.SiliconFlowHook",
                "connection-type": "siliconflow",
                "hook-name": _NAME,
                "conn-fields": CONN_FIELDS,
                "ui-field-behaviour": behaviour,
            }
        ],
        "task-decorators": [
            {
                "name": "siliconflow_batch",
                "class-name": f"{_PACKAGE}.decorators.batch.siliconflow_batch_task",
            }
        ],
        "config": {
            "siliconflow": {
                "description": "Settings of the SiliconFlow provider.",
                "options": {
                    "task_state_store": {
                        "description": (
                            "Record submissions in Airflow's task state store (Airflow 3.3+). Without it, a "
                            "retry searches the account for the batches of earlier tries."
                        ),
                        "version_added": "0.1.0",
                        "type": "boolean",
                        "example": None,
                        "default": "True",
                    },
                    "deployment_id": {
                        "description": (
                            "Name of this Airflow deployment, part of the identity of everything it submits. Two "
                            "deployments with the same DAGs and runs on one account need different names; otherwise "
                            "each adopts the other's batches. Do not change it while batches run: retries would not "
                            "find them."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "production",
                        "default": None,
                    },
                    "prices": {
                        "description": (
                            "Prices in CNY per million tokens by model, as JSON. They are used where neither the "
                            "operator's argument prices nor the connection's extra has a price for the model."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": '{"deepseek-ai/DeepSeek-V3": {"prompt": 1, "completion": 4}}',
                        "default": None,
                    },
                },
            }
        },
        "extra-links": [f"{_PACKAGE}.links.batch.BatchConsoleLink"],
    }

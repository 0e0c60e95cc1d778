"""What Airflow reads of the package: metadata, the connection form, and no more than that at parse time."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_siliconflow.get_provider_info import get_provider_info

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


#: What a DAG file has loaded before it comes to us.
BASELINE = """
import json, sys
import airflow.decorators, airflow.triggers.base
import airflow.providers.common.compat.sdk as sdk
for name in ("BaseOperator", "BaseSensorOperator", "BaseHook", "BaseOperatorLink", "DAG", "task", "conf",
             "AirflowFailException", "AirflowSensorTimeout", "PokeReturnValue"):
    getattr(sdk, name)
before = set(sys.modules)
"""


def test_parsing_a_dag_loads_nothing_but_the_thin_rooms() -> None:
    modules = ["operators.batch", "sensors.batch", "triggers.batch", "decorators.batch"]
    imports = "".join(f"import airflow_provider_siliconflow.{module}\n" for module in modules)
    run = run_python(f"{BASELINE}{imports}print(json.dumps(sorted(set(sys.modules) - before)))")
    assert run.returncode == 0, run.stderr
    loaded = json.loads(run.stdout.splitlines()[-1])
    assert "airflow_provider_siliconflow.sensors.batch" in loaded
    prefix = "airflow_provider_siliconflow."
    ours = {name.removeprefix(prefix) for name in loaded if name.startswith(prefix)}
    rooms = {"api", "operators", "sensors", "triggers", "decorators", "hooks", "links"}
    assert {name.partition(".")[0] for name in ours} <= rooms | {"batch_files", "paths", "task"}
    # Of the API only what its limits are: no models, no clients.
    assert {name for name in ours if name.startswith("api.")} == {"api.arguments", "api.exceptions"}
    # And of the request files what is checked of arguments then.
    files = {name for name in ours if name.startswith("batch_files.")}
    assert files <= {"batch_files.output_types", "batch_files.parameters", "batch_files.prices"}
    others = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert others <= {"airflow", "airflow_provider_siliconflow"}


def test_reading_the_metadata_loads_nothing_at_all() -> None:
    code = (
        "import sys\nfrom airflow_provider_siliconflow.get_provider_info import get_provider_info\n"
        "get_provider_info()\n"
        "print({n.partition('.')[0] for n in sys.modules} - {*sys.stdlib_module_names, '__main__'})"
    )
    run = run_python(code, "-S")
    assert run.stdout.strip() == "{'airflow_provider_siliconflow'}", run.stdout + run.stderr


def test_the_metadata_is_what_airflow_asks_for() -> None:
    import airflow
    import jsonschema

    schema = Path(airflow.__file__).with_name("provider_info.schema.json")
    info = get_provider_info()
    jsonschema.validate(info, json.loads(schema.read_text()))
    # It is kept as JSON.
    assert json.loads(json.dumps(info)) == info


def _named(info: dict[str, Any]) -> list[str]:
    classes = [connection["hook-class-name"] for connection in info["connection-types"]]
    classes += info["extra-links"] + [decorator["class-name"] for decorator in info["task-decorators"]]
    modules = [
        module
        for kind in ("hooks", "operators", "sensors", "triggers")
        for entry in info[kind]
        for module in entry["python-modules"]
    ]
    return [*classes, *(f"{module}.__doc__" for module in modules)]


@pytest.mark.parametrize("path", _named(get_provider_info()))
def test_what_the_metadata_names_is_there(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name)


def test_every_operator_sensor_and_trigger_is_in_a_module_that_is_named() -> None:
    """``operators.batch`` is the one public place for the operators, each of which has a file of its own."""
    from airflow_provider_siliconflow.operators import batch

    info = get_provider_info()
    for kind in ("operators", "sensors", "triggers"):
        (entry,) = info[kind]
        assert entry["python-modules"] == [f"airflow_provider_siliconflow.{kind}.batch"]
    files = (ROOT / "airflow_provider_siliconflow" / "operators").glob("[!_]*.py")
    there = {
        name
        for path in files
        for name in re.findall(r"^class (\w+Operator)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert set(batch.__all__) == there - {"SiliconFlowOperator", "FileOperator", "SubmittingOperator"}


def test_airflow_finds_the_provider() -> None:
    """As ``airflow providers`` does, over the installed entry point; a word of complaint fails it."""
    code = """
import json, logging
from airflow.providers_manager import ProvidersManager
manager = ProvidersManager()
hook = manager.hooks["siliconflow"]
links = [link for link in manager.extra_links_class_names if "siliconflow" in link]
print(json.dumps([hook.hook_name, hook.hook_class_name, hook.connection_id_attribute_name, links,
    "airflow-provider-siliconflow" in manager.providers]))
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [
        "SiliconFlow",
        "airflow_provider_siliconflow.hooks.siliconflow.SiliconFlowHook",
        "conn_id",
        ["airflow_provider_siliconflow.links.batch.BatchConsoleLink"],
        True,
    ]
    complaints = [line for line in (run.stdout + run.stderr).splitlines() if "siliconflow" in line.lower()]
    assert not [line for line in complaints if "WARN" in line.upper() or "ERROR" in line.upper()]


def test_the_old_forms_fields_are_the_new_ones() -> None:
    pytest.importorskip("flask_appbuilder")
    from wtforms import Form

    from airflow_provider_siliconflow.hooks.connection_form import CONN_FIELDS
    from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook

    widgets = SiliconFlowHook.get_connection_form_widgets()
    assert tuple(widgets) == tuple(CONN_FIELDS)
    form = type("ConnectionForm", (Form,), widgets)()
    assert form["secret_headers"].type == "PasswordField"
    assert "Default 60" in form["timeout"].description


def test_a_field_of_the_form_cannot_hold_what_the_hook_refuses() -> None:
    import jsonschema

    from airflow_provider_siliconflow.hooks.connection_form import CONN_FIELDS

    for field in CONN_FIELDS.values():
        jsonschema.Draft202012Validator.check_schema(field["schema"])
        jsonschema.validate(None, field["schema"])
    for name, value in (("timeout", 0), ("connect_timeout", -1), ("max_retries", 1.5), ("verify", False)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, CONN_FIELDS[name]["schema"])

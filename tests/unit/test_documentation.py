"""The documentation names what there is: arguments, errors, extras, files; and its code is code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import tomllib
from pathlib import Path

import pytest

from airflow_provider_siliconflow.api import exceptions
from airflow_provider_siliconflow.batch_files.reader import check_request_file
from airflow_provider_siliconflow.emulator import running_emulator
from airflow_provider_siliconflow.hooks.connection import EXTRA_FIELDS
from airflow_provider_siliconflow.hooks.siliconflow import SiliconFlowHook
from airflow_provider_siliconflow.operators.batch import (
    CancelBatchOperator,
    CreateBatchOperator,
    DownloadBatchResultsOperator,
    RunBatchOperator,
    UploadBatchFileOperator,
)
from airflow_provider_siliconflow.sensors.batch import BatchSensor

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs/guides").glob("*.md")),
    ROOT / "README.zh-CN.md",
    *sorted((ROOT / "docs/zh").rglob("*.md")),
]
TRANSLATIONS = [
    (ROOT / "README.md", ROOT / "README.zh-CN.md"),
    *((ROOT / "docs/guides" / page.name, page) for page in sorted((ROOT / "docs/zh/guides").glob("*.md"))),
]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
CODE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    return REFERENCE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def anchors(page: Path) -> set[str]:
    """As they are made of headings: lower case, without punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_is_code(page: Path) -> None:
    for language, code in CODE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            ast.parse(code)
        elif language == "json":
            try:
                json.loads(code)
            except ValueError:
                assert all(json.loads(line) for line in code.splitlines())


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and code of each fenced block, without comments: those are translated."""
    return [
        (language, ast.dump(ast.parse(code)) if language == "python" else re.sub(r" *#.*", "", code))
        for language, code in FENCED.findall(page.read_text(encoding="utf-8"))
    ]


def headings_and_names(page: Path) -> tuple[list[str], set[str]]:
    """Return the levels of the headings, and what is set as code within the text."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"^#+(?= )", text, re.MULTILINE), set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.parametrize(
    ("original", "translation"), TRANSLATIONS, ids=[str(page.relative_to(ROOT)) for _, page in TRANSLATIONS]
)
def test_a_translation_has_the_code_and_the_names_of_its_original(original: Path, translation: Path) -> None:
    assert blocks(translation) == blocks(original)
    assert headings_and_names(translation) == headings_and_names(original)


@pytest.mark.parametrize(
    "thing",
    [
        RunBatchOperator,
        UploadBatchFileOperator,
        CreateBatchOperator,
        BatchSensor,
        DownloadBatchResultsOperator,
        CancelBatchOperator,
    ],
)
def test_the_reference_names_every_argument(thing: type) -> None:
    said = section(thing.__name__)
    shared = section("Shared arguments")
    own = set(inspect.signature(thing.__init__).parameters) - {"self", "args", "kwargs"}  # type: ignore[misc]
    for argument in sorted(own | {"conn_id", "fail_fast"}):
        assert f"`{argument}`" in said, argument
        row = re.search(rf"^\| `{argument}`[^|]*\|([^|]*)\|", f"{said}\n{shared}", re.MULTILINE)
        if row is not None and thing is not BatchSensor:
            assert (row[1].strip() == "t") == (argument in thing.template_fields), argument  # type: ignore[attr-defined]


def test_the_reference_names_every_error_and_setting() -> None:
    errors = [
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and issubclass(value, exceptions.SiliconFlowError)
    ]
    assert len(errors) > 20
    for name in errors:
        assert name == "SiliconFlowError" or f"\n| `{name}`" in section("Exceptions"), name
    assert all(f"| `{field}` |" in section("Connection") for field in EXTRA_FIELDS)
    methods = [name for name, value in vars(SiliconFlowHook).items() if inspect.isfunction(value)]
    inner = {"__init__", "poll_once"}
    assert all(f"`{name}(" in section("SiliconFlowHook") for name in methods if name not in inner)


def test_the_manifest_in_the_reference_has_the_keys_of_a_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_emulator(speed=100_000.0) as emulator:
        monkeypatch.setenv("AIRFLOW_CONN_SILICONFLOW_DEFAULT", emulator.airflow_connection)
        hook = SiliconFlowHook()
        line = b'{"custom_id": "a", "body": {"messages": [{"role": "user", "content": "Hi"}]}}\n'
        batch = hook.create_batch(hook.upload_file(line).id, replace={"model": "Qwen/Qwen3-8B"})
        hook.wait_for_batch(batch.id, poll_interval=0.1)
        real = hook.download_results(batch.id, tmp_path)
    text = section("The manifest")
    shown = json.loads(CODE.findall(text)[0][1])
    assert set(real) == set(shown) - {"worth_another_attempt", "budget", "task", "run"}
    assert set(real["models"][0]) == set(shown["models"][0])
    assert set(real["models"][0]["batches"][0]) == set(shown["models"][0]["batches"][0])
    assert all(f"`{key}`" in text for key in shown)


def test_extras_are_what_the_readme_says() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in extras)
    assert extras["s3"][0] in readme


def test_the_requests_of_the_quickstart_are_requests() -> None:
    path = ROOT / "example_dags" / "data" / "requests.jsonl"
    assert check_request_file(path, name=path.name).rows == 6

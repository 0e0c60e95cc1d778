"""The command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import requests

from airflow_provider_siliconflow.emulator.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = [sys.executable, "-m", "airflow_provider_siliconflow.emulator"]


def test_runs_tells_how_to_connect_and_ends_on_sigterm(tmp_path: Path) -> None:
    port_file = tmp_path / "url"
    options = ["--port", "0", "--port-file", str(port_file), "--model", "my/model=0.5", "--key", "sk-mine"]
    options += ["--model", "other=1", "--price", "my/model=1/4/0.5", "--price", "other=1/4"]
    options += ["--batch-model", "my/model", "--batch-model", "other", "--no-json-model", "other"]
    options += ["--no-thinking-model", "my/model", "--live-price", "other=2/8"]
    odd = {"settle_as": "null", "max_open_batches": 3, "missing_file_status": 400, "list_endless": True}
    odd |= {"late_error_seconds": 2.5, "clock_offset_seconds": -7200.0}
    odd |= {"invalid_rate": 0.1, "wrong_attempts": 2, "thinking_tokens": 40, "cached_share": 0.5}
    odd |= {"live_latency": 0.5, "live_jitter": 0.25, "live_rpm": 600, "live_tpm": 9000, "live_burst": 2.0}
    odd |= {"live_retry_after": 1.5, "live_error_rate": 0.125}
    for name, value in odd.items():
        options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    process = subprocess.Popen(
        [*COMMAND, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    try:
        assert process.stdout is not None
        line = ""
        while "AIRFLOW_CONN" not in line:
            line = process.stdout.readline()
            assert line, process.communicate()
        connection = re.search(r"AIRFLOW_CONN_SILICONFLOW_DEFAULT='(.*)'", line)
        assert connection is not None
        given = json.loads(connection[1])
        assert given["conn_type"] == "siliconflow"
        headers = {"Authorization": f"Bearer {given['password']}"}
        models = requests.get(f"{given['host']}/models?sub_type=chat", headers=headers, timeout=20).json()
        assert "my/model" in [model["id"] for model in models["data"]]
        config = requests.get(f"{given['host'].removesuffix('/v1')}/_emulator/config", timeout=20).json()
        assert {name: config[name] for name in odd} == odd
        price = {"prompt": "1", "completion": "4", "cached_prompt": "0.5", "live": None}
        live = {"prompt": "2", "completion": "8", "cached_prompt": None}
        assert config["prices"] == {
            "my/model": price,
            "other": {**price, "cached_prompt": None, "live": live},
        }
        lists = {name: config[name] for name in ("batch_models", "no_json_models", "no_thinking_models")}
        assert list(lists.values()) == [["my/model", "other"], ["other"], ["my/model"]]
        headers = {"Authorization": "Bearer sk-other"}
        assert requests.get(f"{given['host']}/models", headers=headers, timeout=20).status_code == 401
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert port_file.read_text().strip() == given["host"]
    assert not list(tmp_path.glob("siliconflow-*"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--fault", "POST /batches:explode"], "there is no fault kind 'explode'"),
        (["--model", "my/model"], "NAME=SKILL"),
        (["--model", "my/model=2"], "between 0 and 1"),
        (["--speed", "0"], "speed must be above 0"),
        (["--answers", "/no/such/file"], "No such file"),
        (["--price", "my/model=1"], "NAME=PROMPT/COMPLETION"),
        (["--price", "my/model=1/many"], "prices of my/model"),
        (["--empty-rate", "2"], "empty_rate must lie between 0 and 1"),
        (["--batch-model", "no/such-model"], "batch_models: there is no model 'no/such-model'"),
    ],
)
def test_wrong_option_is_named(capsys: pytest.CaptureFixture[str], options: list[str], reason: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*options, "--port", "0"])
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_answers_file_with_a_wrong_line_is_refused_with_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question": "1+1?", "answer": 2}\n{"question": "2+2?"}\n')
    with pytest.raises(SystemExit):
        main(["--answers", str(answers), "--port", "0"])
    assert "line 2" in capsys.readouterr().err

"""Five nights of the evaluation example on a live Airflow, in the fourth of which a model became worse."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.system.live import AIRFLOW, EXHAUSTIVE, KEY

pytestmark = pytest.mark.skipif(not EXHAUSTIVE, reason="takes four minutes; EXHAUSTIVE=1 runs it")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_dags"
DAG_ID = "siliconflow_nightly_evaluation"
R1, V3, JUDGE = "deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-235B-A22B"
SKILLS = {R1: 0.93, V3: 0.88, JUDGE: 0.85}


def test_the_gate_names_the_model_that_became_worse(tmp_path: Path) -> None:
    from airflow_provider_siliconflow.emulator.server import running_emulator
    from scripts.live_airflow import LiveAirflow

    answers = tmp_path / "answers.jsonl"
    answers.write_bytes(
        (EXAMPLES / "data" / "questions.jsonl").read_bytes()
        + (EXAMPLES / "data" / "judge_answers.jsonl").read_bytes()
    )
    folder = tmp_path / "evaluation"
    with running_emulator(
        speed=100.0, keys=(KEY,), answers=answers, models=SKILLS, live_latency=0.05
    ) as emulator:
        env = {
            "AIRFLOW_CONN_SILICONFLOW_DEFAULT": emulator.airflow_connection,
            "SILICONFLOW_POLL_SECONDS": "1",
            "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",
        }
        with LiveAirflow(tmp_path / "airflow", EXAMPLES, env=env) as airflow:
            for night in range(1, 6):
                emulator.service.configure({"models": {**SKILLS, V3: 0.6 if night == 4 else SKILLS[V3]}})
                conf = {"output_dir": str(folder), "judge_model": JUDGE, "max_tokens": 64}
                if night == 5:
                    # All of this night is asked live, and answered as in the third.
                    conf["results_by"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
                run_id = airflow.trigger(DAG_ID, conf=conf)
                state = airflow.wait_for_run(DAG_ID, run_id, timeout=240)
                log = airflow.task_log(DAG_ID, run_id, "gate")
                assert state == ("failed" if night == 4 else "success"), log
                assert airflow.task_state(DAG_ID, run_id, "leaderboard") == "success"
                if night == 4:
                    message = log[log.rindex("AirflowFailException") :] if AIRFLOW >= (3, 0) else log
                    assert V3 in message
                    assert R1 not in message
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert len(history) == 5
    (worse,) = (each for each in history[3]["comparisons"] if each["model"] == V3)
    assert worse["worse_count"] > worse["better_count"]
    assert worse["p"] < 0.05
    page = (folder / "leaderboard.html").read_text()
    assert all(model in page for model in (R1, V3))
    print(
        f"{V3}: {worse['worse_count']} questions became worse, {worse['better_count']} better, p {worse['p']:.2g}"
    )

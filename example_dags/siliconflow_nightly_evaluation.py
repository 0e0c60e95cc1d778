"""
### Nightly evaluation

Asks several models the same questions over one upload, scores the answers and updates a leaderboard page.

The parameter `output_dir`, or else the Airflow variable `siliconflow_evaluation_dir`, is the path or URI of a folder
that all workers can reach. In it, `leaderboard.html` shows the latest night and `history.jsonl` has one line per
night. Each night's requests, results and scored answers are in a separate subfolder.

With the parameter `cache_dir`, a question that a model answered on an earlier night is not sent again: a night then
costs what is new, be it a question, a model or a changed parameter.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.common.compat.sdk import DAG, Param, task

from airflow_provider_siliconflow.operators.batch import RunBatchOperator

HERE = Path(__file__).parent
QUESTIONS = HERE / "data" / "questions.jsonl"

# The tasks import from `evaluation`. Some Airflow versions and commands do not put this folder on the path, and none
# does if it is a subfolder of the DAG folder.
if str(HERE) not in sys.path:
    sys.path.append(str(HERE))

MODELS = [
    "deepseek-ai/DeepSeek-R1",
    "deepseek-ai/DeepSeek-V3",
]

# CNY per million tokens. These are examples: replace them with the batch prices of your account.
PRICES = {
    "deepseek-ai/DeepSeek-R1": {"prompt": 2.0, "completion": 8.0},
    "deepseek-ai/DeepSeek-V3": {"prompt": 1.0, "completion": 4.0},
}

# Batches take hours, so one poll a minute is enough. The local emulator is much faster.
POLL_SECONDS = float(os.environ.get("SILICONFLOW_POLL_SECONDS", "60"))

with DAG(
    dag_id="siliconflow_nightly_evaluation",
    doc_md=__doc__,
    start_date=datetime(2026, 1, 1),
    schedule="@daily",
    catchup=False,
    # The history is one file that each run rewrites, so only one run may be active.
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=1)},
    tags=["siliconflow", "example"],
    params={
        "questions": Param(str(QUESTIONS), type="string", description="Path or URI of the questions (JSONL)"),
        "models": Param(MODELS, type="array", items={"type": "string"}, minItems=1),
        "output_dir": Param("", type="string", description="Path or URI of the leaderboard's folder"),
        "cache_dir": Param(
            "", type="string", description="Path or URI of cached answers; empty: ask everything"
        ),
        "prices": Param(PRICES, type="object", description="CNY per million tokens, by model"),
        "note": Param("", type="string", description="A sentence for the top of the page"),
        "max_tokens": Param(2048, type="integer", minimum=1, description="Maximum length of an answer"),
    },
) as dag:

    @task(multiple_outputs=True)
    def prepare(folder: str, params: Any = None, dag_run: Any = None) -> dict[str, Any]:
        """Write this night's requests."""
        import json

        from airflow.providers.common.compat.sdk import ObjectStoragePath
        from evaluation.questions import read_questions, request_rows

        if not folder:
            raise ValueError(
                "set the parameter output_dir or the Airflow variable siliconflow_evaluation_dir"
            )
        # On Airflow 3 a manual run may have no logical date.
        date = dag_run.logical_date or dag_run.run_after
        questions = read_questions(ObjectStoragePath(params["questions"]))
        night = ObjectStoragePath(folder) / f"{date:%Y-%m-%dT%H%M%S}"
        night.mkdir(parents=True, exist_ok=True)
        # A date in the prompt would make every night's requests new.
        shown = None if params["cache_dir"] else f"{date:%Y-%m-%d}"
        rows = request_rows(questions, date=shown, max_tokens=params["max_tokens"])
        requests = night / "requests.jsonl"
        requests.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        return {
            "date": date.isoformat(),
            "folder": folder,
            "night": str(night),
            "requests": str(requests),
            "prices": params["prices"],
        }

    @task
    def models(params: Any = None) -> list[str]:
        """Return the models from the run's parameters."""
        return list(dict.fromkeys(params["models"]))

    @task
    def score(model: str, manifest: dict[str, Any], params: Any = None) -> dict[str, Any]:
        """Judge one model's answers and write the judged answers next to its results."""
        from dataclasses import asdict

        from airflow.providers.common.compat.sdk import ObjectStoragePath
        from evaluation.questions import read_questions
        from evaluation.scoring import score_model, write_scored

        from airflow_provider_siliconflow.results import read_results

        questions = read_questions(ObjectStoragePath(params["questions"]))
        result, rows = score_model(model, questions, read_results(manifest, model=model))
        (paths,) = (each["paths"] for each in manifest["models"] if each["model"] == model)
        scored = ObjectStoragePath(paths["results"]).parent / "scored.jsonl"
        write_scored(scored, rows)
        low, high = result.interval
        print(
            f"{model}: {result.accuracy:.1%} correct ({low:.1%} to {high:.1%}), {result.right} of {result.asked}"
        )
        return {"score": asdict(result), "scored": str(scored)}

    @task
    def leaderboard(
        night: dict[str, Any],
        manifest: dict[str, Any],
        scores: Any,
        params: Any = None,
        dag_run: Any = None,
    ) -> str:
        """Add the night to the history, write the page and return its path."""
        from airflow.providers.common.compat.sdk import ObjectStoragePath
        from evaluation.leaderboard import PAGE_FILE, Night, Standing, add_night, most_missed
        from evaluation.page import render_page
        from evaluation.questions import read_questions
        from evaluation.scoring import ModelScore, read_scored

        standings, scored = [], {}
        for each in scores:
            standing = Standing.from_manifest(ModelScore.from_dict(each["score"]), manifest)
            standings.append(standing)
            scored[standing.model] = read_scored(ObjectStoragePath(each["scored"]))
        folder = ObjectStoragePath(night["folder"])
        nights = add_night(folder, Night(night["date"], dag_run.run_id, standings))
        questions = read_questions(ObjectStoragePath(params["questions"]))
        # The page shows the latest night, even if this run repeats an older one.
        missed = most_missed(questions, scored) if nights[-1].run_id == dag_run.run_id else []
        page = folder / PAGE_FILE
        page.write_text(render_page(nights, missed, note=params["note"]), encoding="utf-8")
        print(f"The leaderboard is in {page}")
        return str(page)

    night = prepare("{{ params.output_dir or var.value.get('siliconflow_evaluation_dir', '') }}")
    chosen = models()
    ask = RunBatchOperator(
        task_id="ask",
        requests=night["requests"],
        output_dir=night["night"],
        models=chosen,
        prices=night["prices"],
        cache_dir="{{ params.cache_dir }}",
        max_row_attempts=3,
        deferrable=True,
        poll_interval=POLL_SECONDS,
    )
    scores = score.partial(manifest=ask.output).expand(model=chosen)
    leaderboard(night, ask.output, scores)

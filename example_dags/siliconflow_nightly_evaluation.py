"""
### Nightly evaluation

Asks several models the same questions over one upload, scores the answers against the key, has a judge model look at
them too, compares each model with the last night and updates a leaderboard page. The last task, `gate`, fails if a
model became significantly worse. Tasks of your own that need a good night go after it.

Nothing has to be set. The parameter `output_dir`, or else the Airflow variable `siliconflow_evaluation_dir`, is the
path or URI of a folder that all workers can reach; the default is `siliconflow_evaluation` in Airflow's home. In it,
`leaderboard.html` shows the latest night and links to a page per model, and `history.jsonl` has one line per night.
Each night's requests, results and scored answers are in a separate subfolder.

With `cache_dir`, a question that a model answered on an earlier night is not sent again: a night then costs what is
new, be it a question, a model or a changed parameter. With `results_by`, what has no answer at that time is asked live.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
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
JUDGE = "deepseek-ai/DeepSeek-V3"

# CNY per million tokens, in batches and live. These are examples: replace them with the prices of your account.
PRICES: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-R1": {
        "prompt": 2.0,
        "completion": 8.0,
        "live": {"prompt": 4.0, "completion": 16.0},
    },
    "deepseek-ai/DeepSeek-V3": {"prompt": 1.0, "completion": 4.0, "live": {"prompt": 2.0, "completion": 8.0}},
}

# Batches take hours, so one poll a minute is enough. The local emulator is much faster.
POLL_SECONDS = float(os.environ.get("SILICONFLOW_POLL_SECONDS", "60"))

# The trigger form takes an empty field for such a parameter, and then passes None.
OPTIONAL = ["null", "string"]

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
        "repeats": Param(
            1, type="integer", minimum=1, maximum=25, description="How often each question is asked"
        ),
        "judge_model": Param(
            JUDGE, type=OPTIONAL, description="Model that judges the answers; empty: no judge"
        ),
        "output_dir": Param(
            None,
            type=OPTIONAL,
            description="Path or URI of the leaderboard's folder; empty: siliconflow_evaluation in Airflow's home",
        ),
        "cache_dir": Param(
            None, type=OPTIONAL, description="Path or URI of cached answers; empty: ask everything"
        ),
        "results_by": Param(
            None,
            type=OPTIONAL,
            description="When to ask live what has no answer yet, such as 08:00+08:00; empty: never",
        ),
        "gate": Param(
            "fail", type="string", enum=["fail", "skip", "off"], description="What a significant drop does"
        ),
        "gate_p": Param(
            0.05, type="number", minimum=0, maximum=1, description="Largest p of a change that is significant"
        ),
        "prices": Param(PRICES, type="object", description="CNY per million tokens, by model"),
        "note": Param(None, type=OPTIONAL, description="A sentence for the top of the page"),
        "max_tokens": Param(2048, type="integer", minimum=1, description="Maximum length of an answer"),
        "temperature": Param(0, type="number", minimum=0, maximum=2),
        "seed": Param(
            0, type="integer", minimum=0, description="Seed of the first repeat; the others count up"
        ),
    },
) as dag:
    # Cheap to import: standard library only.
    from evaluation.judge import VERDICT

    @task(multiple_outputs=True)
    def prepare(folder: str, params: Any = None, dag_run: Any = None) -> dict[str, Any]:
        """Write this night's requests."""
        import json

        from airflow.providers.common.compat.sdk import ObjectStoragePath
        from evaluation.questions import dataset_hash, read_questions, request_rows
        from evaluation.schedule import live_time

        home = os.environ.get("AIRFLOW_HOME") or "~/airflow"
        folder = folder or os.path.join(os.path.expanduser(home), "siliconflow_evaluation")
        live_after = live_time(params["results_by"], datetime.now(UTC))
        # On Airflow 3 a manual run may have no logical date.
        date = dag_run.logical_date or dag_run.run_after
        questions = read_questions(ObjectStoragePath(params["questions"]))
        name = f"{date:%Y-%m-%dT%H%M%S}"
        night = ObjectStoragePath(folder) / name
        night.mkdir(parents=True, exist_ok=True)
        settings = {key: params[key] for key in ("max_tokens", "temperature", "repeats")}
        rows = request_rows(questions, **settings, seed=params["seed"])
        requests = night / "requests.jsonl"
        with requests.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return {
            "date": date.isoformat(),
            "folder": folder,
            "name": name,
            "night": str(night),
            "requests": str(requests),
            "answers": str(night / "ask"),
            "verdicts": str(night / "judge"),
            "dataset": dataset_hash(questions),
            "settings": settings,
            "prices": params["prices"],
            # An empty text, since an XCom of None is as good as none.
            "live_after": live_after or "",
        }

    @task
    def models(params: Any = None) -> list[str]:
        """Return the models from the run's parameters."""
        return list(dict.fromkeys(params["models"]))

    @task
    def score(
        model: str, night: dict[str, Any], manifest: dict[str, Any], params: Any = None
    ) -> dict[str, Any]:
        """Score one model's answers against the key and write the scored answers to the night's folder."""
        from dataclasses import asdict

        from airflow.providers.common.compat.sdk import ObjectStoragePath
        from evaluation.leaderboard import file_name
        from evaluation.questions import read_questions
        from evaluation.scoring import score_model, write_scored

        from airflow_provider_siliconflow.results import read_results

        questions = read_questions(ObjectStoragePath(params["questions"]))
        answers = read_results(manifest, model=model)
        result, rows = score_model(model, questions, answers, night["settings"]["repeats"])
        folder = ObjectStoragePath(night["night"]) / "scored"
        folder.mkdir(parents=True, exist_ok=True)
        write_scored(folder / f"{file_name(model)}.jsonl", rows)
        low, high = result.interval
        print(
            f"{model}: {result.accuracy:.1%} correct ({low:.1%} to {high:.1%}), {result.right} of {result.asked}"
        )
        return asdict(result)

    @task
    def judge_requests(
        night: dict[str, Any], manifest: dict[str, Any], scores: Any, params: Any = None
    ) -> dict[str, Any]:
        """Write the requests to the judge: each answer twice, the second time with the texts swapped."""
        import json

        from airflow.providers.common.compat.sdk import AirflowSkipException, ObjectStoragePath
        from evaluation.judge import judge_rows
        from evaluation.leaderboard import file_name
        from evaluation.questions import read_questions
        from evaluation.scoring import read_scored

        from airflow_provider_siliconflow.results import read_results

        if not params["judge_model"]:
            raise AirflowSkipException("judge_model is empty: there is no judge")
        questions = read_questions(ObjectStoragePath(params["questions"]))
        folder = ObjectStoragePath(night["night"])
        requests = folder / "judge_requests.jsonl"
        with requests.open("w", encoding="utf-8") as file:
            for number, each in enumerate(scores):
                model = each["model"]
                scored = read_scored(folder / "scored" / f"{file_name(model)}.jsonl")
                answers = read_results(manifest, model=model)
                for row in judge_rows(number, questions, scored, answers, night["settings"]["repeats"]):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return {"model": params["judge_model"], "requests": str(requests)}

    # Not if a score or `ask` failed. A judge that was skipped does not matter.
    @task(trigger_rule="none_failed")
    def leaderboard(
        night: dict[str, Any],
        manifest: dict[str, Any],
        scores: Any,
        verdicts: Any = None,
        params: Any = None,
        dag_run: Any = None,
    ) -> str:
        """Compare the night with the last one, add it to the history, write the pages and return the path."""
        from airflow.providers.common.compat.sdk import ObjectStoragePath
        from evaluation.gate import describe
        from evaluation.leaderboard import Judge, Night, Standing, add_night
        from evaluation.publishing import compare_with_last, publish, store_verdicts
        from evaluation.questions import read_questions
        from evaluation.scoring import ModelScore

        from airflow_provider_siliconflow.results import read_results

        root = ObjectStoragePath(night["folder"])
        questions = read_questions(ObjectStoragePath(params["questions"]))
        standings = [Standing.from_manifest(ModelScore.from_dict(each), manifest) for each in scores]
        tonight = Night(
            night["date"], dag_run.run_id, standings, night["name"], night["dataset"], night["settings"]
        )
        if verdicts:
            results = read_results(verdicts, output_type=VERDICT)
            tonight.judge = Judge.from_manifest(verdicts, store_verdicts(root, tonight, questions, results))
        tonight.comparisons = compare_with_last(root, tonight)
        nights = add_night(root, tonight)
        print(describe(tonight.comparisons, params["gate_p"]))
        # The pages show the latest night, even if this run repeats an older one.
        page = publish(root, nights, questions, note=params["note"] or "", gate_p=params["gate_p"])
        print(f"The leaderboard is in {page}")
        return str(page)

    @task
    def gate(night: dict[str, Any], params: Any = None, dag_run: Any = None) -> str:
        """Fail or skip if a model became significantly worse since the last night."""
        from airflow.providers.common.compat.sdk import (
            AirflowFailException,
            AirflowSkipException,
            ObjectStoragePath,
        )
        from evaluation.gate import describe, drops
        from evaluation.leaderboard import read_history
        from evaluation.questions import read_questions

        history = read_history(ObjectStoragePath(night["folder"]))
        (tonight,) = (each for each in history if each.run_id == dag_run.run_id)
        questions = read_questions(ObjectStoragePath(params["questions"]))
        texts = {each.id: each.question for each in questions}
        told: str = describe(tonight.comparisons, params["gate_p"], texts)
        if params["gate"] == "off" or not (worse := drops(tonight.comparisons, params["gate_p"])):
            return told
        message = describe(worse, params["gate_p"], texts)
        if params["gate"] == "skip":
            raise AirflowSkipException(message)
        # Not retried: the answers are what they are.
        raise AirflowFailException(message)

    night = prepare("{{ params.output_dir or var.value.get('siliconflow_evaluation_dir', '') }}")
    chosen = models()
    common = {
        "prices": night["prices"],
        "cache_dir": "{{ params.cache_dir or '' }}",
        "max_row_attempts": 3,
        "deferrable": True,
        "poll_interval": POLL_SECONDS,
        "live_after": night["live_after"],
    }
    ask = RunBatchOperator(
        task_id="ask", requests=night["requests"], output_dir=night["answers"], models=chosen, **common
    )
    scores = score.partial(night=night, manifest=ask.output).expand(model=chosen)
    to_judge = judge_requests(night, ask.output, scores)
    judge = RunBatchOperator(
        task_id="judge",
        requests=to_judge["requests"],
        output_dir=night["verdicts"],
        model=to_judge["model"],
        output_type=VERDICT,
        # An answer that the judge does not judge is shown as such, and no reason to withhold the leaderboard.
        allow_all_failed=True,
        skip_if_empty=True,
        **common,
    )
    leaderboard(night, ask.output, scores, judge.output) >> gate(night)

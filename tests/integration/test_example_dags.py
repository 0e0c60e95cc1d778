"""The example DAGs, each run with ``airflow dags test`` against an emulator that knows the answers."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import sqlite3
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from airflow_provider_siliconflow.emulator.server import Emulator

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "example_dags"
QUESTIONS = EXAMPLES / "data" / "questions.jsonl"
JUDGE_ANSWERS = EXAMPLES / "data" / "judge_answers.jsonl"
QUICK = {"SILICONFLOW_POLL_SECONDS": "1"}

DagTest = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.every_airflow


def run(
    dag_test: DagTest, dag_id: str, conf: Mapping[str, Any] | None, env: Mapping[str, str] | None = None
) -> str:
    done = dag_test(EXAMPLES / f"{dag_id}.py", dag_id, conf, {**QUICK, **(env or {})})
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-3000:]
    return told


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rightly_answered(results: Path, key: Mapping[str, set[str]]) -> int:
    """Count independently of the example's own scoring: the emulator ends each answer in ``Answer: ...``."""
    right = 0
    for row in lines(results):
        text = row["response"]["body"]["choices"][0]["message"]["content"]
        right += text.rpartition("Answer: ")[2] in key[row["custom_id"]]
    return right


def test_quickstart_with_its_defaults(dag_test: DagTest, emulator: Emulator, tmp_path: Path) -> None:
    run(dag_test, "siliconflow_batch_quickstart", None, {"TMPDIR": str(tmp_path)})
    assert emulator.request_counts["POST /batches"] == 1
    asked = [row["custom_id"] for row in lines(EXAMPLES / "data" / "requests.jsonl")]
    answered = lines(tmp_path / "siliconflow_quickstart" / "results.jsonl")
    assert sorted(row["custom_id"] for row in answered) == sorted(asked)
    assert all(row["response"]["body"]["model"] == "deepseek-ai/DeepSeek-V3" for row in answered)


def evaluate(
    dag_test: DagTest, emulator: Emulator, board: Path | None, conf: Mapping[str, Any]
) -> tuple[int, str]:
    """Run a night and return the exit code and what was logged. Without ``board``, nothing is set."""
    done = dag_test(
        EXAMPLES / "siliconflow_nightly_evaluation.py",
        "siliconflow_nightly_evaluation",
        {**({} if board is None else {"output_dir": str(board)}), **conf},
        QUICK | {"AIRFLOW_CONN_SILICONFLOW_DEFAULT": emulator.airflow_connection},
    )
    return done.returncode, done.stdout + done.stderr


def judging_emulator(make_emulator: Callable[..., Emulator], folder: Path, **settings: Any) -> Emulator:
    """Return an emulator that knows the questions and can judge answers."""
    answers = folder / "answers.jsonl"
    answers.write_bytes(QUESTIONS.read_bytes() + JUDGE_ANSWERS.read_bytes())
    return make_emulator(speed=1000.0, answers=answers, **settings)


def test_nightly_evaluation_with_its_defaults(
    dag_test: DagTest, make_emulator: Callable[..., Emulator], airflow_home: Path, tmp_path: Path
) -> None:
    emulator = judging_emulator(make_emulator, tmp_path, row_error_rate=0.05)
    code, told = evaluate(dag_test, emulator, None, {})
    assert code == 0, told[-3000:]
    board = airflow_home / "siliconflow_evaluation"
    (night,) = lines(board / "history.jsonl")
    (manifest_file,) = board.glob("*/ask/manifest.json")
    manifest = json.loads(manifest_file.read_text())

    # One upload for both models. Only the rows with a transient failure were sent again.
    first, again = manifest["rounds"]
    assert (first["batches"], first["rows"]) == (2, 240)
    assert 0 < again["rows"] == 240 - first["ok"] < 30
    assert manifest["rows"]["ok"] == 240
    inputs = [batch["request"]["input_file_id"] for batch in emulator.service.state()["batches"]]
    assert len(set(inputs[:2])) == 1

    key = {row["id"]: {row["answer"], *row.get("accept", ())} for row in lines(QUESTIONS)}
    files = {each["model"]: Path(each["paths"]["results"]) for each in manifest["models"]}
    scores = {each["score"]["model"]: each["score"] for each in night["standings"]}
    assert {name: score["right"] for name, score in scores.items()} == {
        model: rightly_answered(file, key) for model, file in files.items()
    }
    assert all(60 < score["right"] < score["asked"] == 120 for score in scores.values())

    page = (board / "leaderboard.html").read_text(encoding="utf-8")
    for model, score in scores.items():
        assert f"{score['right'] / 120 * 100:.1f}\u202f%" in page
        assert f"{score['right']} of 120" in page
        link = f"models/{model.replace('/', '--')}.html"
        assert f'href="{link}"' in page
        shown = (board / link).read_text(encoding="utf-8")
        assert shown.count('class="verdict yes"') == score["right"]
        assert shown.count('class="verdict no"') == 120 - score["right"]
    assert hash_of_questions() == night["dataset"]
    assert night["dataset"] in page

    # The judge was asked twice about each answer. It is DeepSeek-V3, which judges 88 % of them rightly and the others
    # by chance.
    assert night["judge"]["rows"] == 480
    for each in night["judge"]["scores"]:
        settled = sum(each[name] for name in ("both_right", "judge_right", "key_right", "both_wrong"))
        assert settled + each["split"] == each["judged"] == 120
        assert 90 < settled < 120
        assert (each["both_right"] + each["both_wrong"]) / settled > 0.95


def hash_of_questions() -> str:
    """Return the dataset's hash, independently of the example's own."""
    rows = sorted(lines(QUESTIONS), key=lambda row: str(row["id"]))
    text = "".join(
        json.dumps(
            {
                "accept": sorted(row.get("accept", ())),
                "answer": row["answer"],
                "id": row["id"],
                "question": row["question"],
                "subject": row["subject"],
            },
            separators=(",", ":"),
        )
        + "\n"
        for row in rows
    )
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_gate_names_the_model_that_became_worse_and_the_questions(
    dag_test: DagTest, make_emulator: Callable[..., Emulator], airflow_home: Path, tmp_path: Path
) -> None:
    good, bad = "deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3"
    emulator = judging_emulator(make_emulator, tmp_path, models={good: 0.93, bad: 0.88})
    board = tmp_path / "board"
    # Repeats and no judge: the other test has a judge and no repeats.
    conf = {"judge_model": None, "repeats": 3}
    code, told = evaluate(dag_test, emulator, board, conf)
    assert code == 0, told[-3000:]
    emulator.service.configure({"models": {good: 0.93, bad: 0.6}})
    code, told = evaluate(dag_test, emulator, board, conf)
    assert code != 0
    first, second = lines(board / "history.jsonl")
    same, worse = second["comparisons"]
    assert (same["model"], same["worse_count"], same["better_count"]) == (good, 0, 0)

    # The drop is what the scored answers say, and the failed task names it.
    def right(night: dict[str, Any]) -> set[str]:
        (file,) = (board / night["folder"] / "scored").glob("*V3.jsonl")
        return {row["id"] for row in lines(file) if sum(row["runs"]) >= 2}

    flipped = right(first) - right(second)
    assert worse["better_count"] == len(right(second) - right(first)) == 0
    assert set(worse["worse"]) == flipped
    assert len(flipped) > 10
    assert worse["p"] == pytest.approx(2 / 2 ** len(flipped))
    failure = next(line for line in told.splitlines() if "AirflowFailException" in line and "WORSE" in line)
    assert f"{bad}: WORSE" in failure
    assert worse["worse"][0] in failure
    assert good not in failure

    # The page does not wait for the gate.
    page = (board / "leaderboard.html").read_text(encoding="utf-8")
    assert "significantly worse" in page
    assert f"{len(flipped)} worse, 0 better of 120 questions" in page
    assert {len(standing["score"]["runs"]) for standing in second["standings"]} == {3}

    # Worse once more, but now the tasks after the gate are only skipped. The time for results has passed: no batches.
    emulator.service.configure({"models": {good: 0.93, bad: 0.2}, "live_latency": 0.01})
    batches = emulator.request_counts["POST /batches"]
    late = {**conf, "gate": "skip", "results_by": "2026-01-01T08:00:00+08:00"}
    code, told = evaluate(dag_test, emulator, board, late)
    assert code == 0, told[-3000:]
    assert [standing["live"] for standing in lines(board / "history.jsonl")[-1]["standings"]] == [360, 360]
    assert emulator.request_counts["POST /batches"] == batches
    with contextlib.closing(sqlite3.connect(airflow_home / "airflow.db")) as database:
        states = database.execute(
            "select state from task_instance where task_id = 'gate' order by start_date"
        )
        assert [state for (state,) in states] == ["success", "failed", "skipped"]


def test_nightly_evaluation_of_a_set_larger_than_a_batch(
    dag_test: DagTest, make_emulator: Callable[..., Emulator], tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"id": f"q{n}", "question": f"What is {n} times 7, for example?", "answer": str(n * 7)}
        for n in range(5003)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"small": 0.5, "large": 0.9}
    emulator = make_emulator(speed=1000.0, answers=questions, models=models)
    done = dag_test(
        EXAMPLES / "siliconflow_nightly_evaluation.py",
        "siliconflow_nightly_evaluation",
        {
            "questions": str(questions),
            "models": list(models),
            "judge_model": None,
            "prices": {"small": {"prompt": 1, "completion": 2}},
        },
        QUICK
        | {
            "AIRFLOW_CONN_SILICONFLOW_DEFAULT": emulator.airflow_connection,
            "AIRFLOW_VAR_SILICONFLOW_EVALUATION_DIR": str(tmp_path / "board"),
        },
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    # Two shards: two uploads, and one batch per shard and model.
    assert emulator.request_counts["POST /files"] == 2
    assert emulator.request_counts["POST /batches"] == 4

    (night,) = lines(tmp_path / "board" / "history.jsonl")
    key = {row["id"]: {row["answer"]} for row in rows}
    for standing in night["standings"]:
        score = standing["score"]
        (results,) = (tmp_path / "board").glob(f"*/ask/{score['model']}/results.jsonl")
        assert score["right"] == rightly_answered(results, key)
        assert score["right"] / 5003 == pytest.approx(models[score["model"]], abs=0.03)
        assert (standing["cost"] is None) == (score["model"] == "large")


@pytest.mark.emulator(speed=1000.0, answers=EXAMPLES / "data" / "review_subjects.jsonl")
def test_classification(dag_test: DagTest, emulator: Emulator, tmp_path: Path) -> None:
    conf = {"rows": 43, "output_dir": str(tmp_path), "model": "deepseek-ai/DeepSeek-V3"}
    told = run(dag_test, "siliconflow_classification", conf)
    assert emulator.request_counts["POST /batches"] == 1
    rows = lines(tmp_path / "results.jsonl")
    assert [row["custom_id"] for row in rows] == [f"review-{n:07}" for n in range(43)]
    labels = [
        json.loads(row["response"]["body"]["choices"][0]["message"]["content"])["answer"] for row in rows
    ]
    for label in set(labels):
        assert f"'{label}': {labels.count(label)}" in told
    # Every row was sent with the common parameters.
    assert {row["response"]["body"]["choices"][0]["finish_reason"] for row in rows} == {"stop"}


def test_a_job_for_each_file_and_language(dag_test: DagTest, emulator: Emulator, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for customer, count in (("acme", 2), ("globex", 3)):
        prompts = [json.dumps({"messages": [{"role": "user", "content": f"{n}"}]}) for n in range(count)]
        (tmp_path / "in" / f"{customer}.jsonl").write_text("".join(f"{prompt}\n" for prompt in prompts))
    conf = {"input_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out")}
    told = run(dag_test, "siliconflow_mapped", {**conf, "languages": ["Dutch", "Welsh"]})
    assert "{'jobs': 4, 'rows': 11, 'ok': 11}" in told
    assert emulator.request_counts["POST /batches"] == 4
    assert len(lines(tmp_path / "out" / "customers" / "acme" / "results.jsonl")) == 2
    assert len(lines(tmp_path / "out" / "customers" / "globex" / "results.jsonl")) == 3
    # Each mapped instance got its own language and all sentences.
    for index, language in enumerate(("Dutch", "Welsh")):
        texts = [
            row["response"]["body"]["choices"][0]["message"]["content"]
            for row in lines(tmp_path / "out" / "languages" / str(index) / "results.jsonl")
        ]
        assert len(texts) == 3
        assert all(language in text for text in texts)


@pytest.mark.emulator(speed=1000.0, invalid_rate=0.3, truncated_rate=0.1, fenced_rate=0.2)
def test_extraction_of_the_shipped_tickets(dag_test: DagTest, emulator: Emulator, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    with (EXAMPLES / "data" / "tickets.csv").open(newline="", encoding="utf-8") as file:
        tickets = {row["id"]: row for row in csv.DictReader(file)}
    run(dag_test, "siliconflow_extraction", {"output_dir": str(tmp_path)})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["rows"]["ok"], manifest["rows"]["total"]) == (len(tickets), len(tickets))
    first, again, *_ = manifest["rounds"]
    assert 0 < again["rows"] == len(tickets) - first["ok"]
    with (tmp_path / "tickets.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert {row["id"]: row["text"] for row in table} == {key: row["text"] for key, row in tickets.items()}
    urgencies = [int(row["ticket_urgency"]) for row in table]
    assert urgencies == sorted(urgencies, reverse=True)
    assert all(row["ticket_subject"] for row in table)
    # What `plausible` does not accept is in none of them.
    assert all(float(row["ticket_amount"] or 0) >= 0 for row in table)

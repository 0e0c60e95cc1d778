"""A night from its scored answers to the pages. Folders are ``pathlib.Path`` or Airflow's ``ObjectStoragePath``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .comparison import Comparison, compare
from .judge import JudgeScore, Parsed, judge_score, read_judged, read_verdicts, write_judged
from .leaderboard import MODELS_FOLDER, PAGE_FILE, Night, file_name, most_missed, read_history
from .model_page import NIGHTS_SHOWN, render_model
from .page import colours, render_page
from .questions import Question, dataset_hash
from .scoring import read_scored


def compare_with_last(root: Any, night: Night) -> list[Comparison]:
    """
    Compare each model with the last night before this one.

    Only nights that asked the same questions in the same way are compared; otherwise the comparison says why not.

    :param root: the folder of the leaderboard.
    """
    earlier = [each for each in read_history(root) if each.date < night.date and each.run_id != night.run_id]
    last = earlier[-1] if earlier else None
    comparisons = []
    for standing in night.standings:
        model = standing.model
        why_not = _why_not(last, night, model)
        if last is None or why_not:
            comparisons.append(Comparison(model, before=last.date if last else "", why_not=why_not))
            continue
        before = last.file(root, "scored", model)
        if not before.exists():
            comparisons.append(
                Comparison(model, before=last.date, why_not="the answers of the last night are gone")
            )
            continue
        now = read_scored(night.file(root, "scored", model))
        comparisons.append(compare(model, now, read_scored(before), last.date))
    return comparisons


def store_verdicts(
    root: Any, night: Night, questions: Sequence[Question], results: Iterable[Parsed]
) -> list[JudgeScore]:
    """
    Write the judge's verdicts to the night's folder, and return how far they agree with the key.

    :param results: the judge's results for the models in the order of the night's standings.
    """
    scores = []
    for each, judged in zip(
        night.standings, read_verdicts(questions, results, len(night.standings)), strict=True
    ):
        file = night.file(root, "judged", each.model)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_judged(file, judged)
        scores.append(judge_score(each.model, read_scored(night.file(root, "scored", each.model)), judged))
    return scores


def publish(
    root: Any, nights: Sequence[Night], questions: Sequence[Question], *, note: str = "", gate_p: float = 0.05
) -> Any:
    """
    Write the pages of the latest night and return the path of the leaderboard.

    At any time it holds the answers of one model over the last nights, and those of all models in the latest night.

    :param nights: all nights, earliest first; at least one.
    :param questions: those of the latest night. With others, as an older night that is repeated may have, the
        leaderboard names no questions, and the pages of the models stay.
    """
    latest = nights[-1]
    if dataset_hash(questions) != latest.dataset:
        questions = ()
    colour = colours(nights)
    (root / MODELS_FOLDER).mkdir(parents=True, exist_ok=True)
    scored = {}
    for each in latest.ranked if questions else ():
        model = each.model
        shown, answers = [], []
        for night in nights[-NIGHTS_SHOWN:]:
            file = night.file(root, "scored", model)
            if night.folder and night.standing(model) is not None and file.exists():
                shown.append(night)
                answers.append(read_scored(file))
        if not shown or shown[-1] is not latest:
            continue
        scored[model] = answers[-1]
        page = render_model(
            model,
            shown,
            answers,
            questions,
            judged=read_judged(latest.file(root, "judged", model)) if latest.judge else None,
            colour=colour(model),
            gate_p=gate_p,
        )
        (root / MODELS_FOLDER / f"{file_name(model)}.html").write_text(page, encoding="utf-8")
    path = root / PAGE_FILE
    texts = {each.id: each.question for each in questions}
    missed = most_missed(questions, scored)
    path.write_text(render_page(nights, missed, note=note, gate_p=gate_p, questions=texts), encoding="utf-8")
    return path


def _why_not(last: Night | None, night: Night, model: str) -> str:
    if last is None:
        return "this is the first night"
    if not last.folder or not last.dataset:
        return "an older version of this evaluation wrote the last night"
    if last.dataset != night.dataset:
        return f"the questions changed: dataset {last.dataset[:12]} became {night.dataset[:12]}"
    changed = [
        f"{name} from {last.settings.get(name)} to {value}"
        for name, value in night.settings.items()
        if last.settings.get(name) != value
    ]
    if changed:
        return f"the settings changed: {', '.join(changed)}"
    return "" if last.standing(model) else "the model was not asked in the last night"

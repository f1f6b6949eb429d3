"""A study in MLflow: the run above its runs, which tells the question and, in the end, the answer."""

from mstkd.compare.result import Comparison
from mstkd.compare.tables import markdown, read_columns
from mstkd.config import RunConfig
from mstkd.study.config import StudyConfig, run_config
from mstkd.track import Tracker, open_study


def track(study: StudyConfig, shards: str) -> Tracker:
    """The study's run, told what is asked."""
    first = next(iter(study.arms))
    values = run_config(study, first, shards or "none", f"{first}-seed{study.seeds[0]}", study.seeds[0], {"runs_dir": str(study.folder / "runs")})
    trained = [arm for arm, declared in study.arms.items() if declared.of is None]
    tried = {f"{arm}-{number}": arm for arm in trained for number in range(len(study.arms[arm].tune))}
    arms = {f"{arm}-seed{seed}": arm for arm in trained for seed in study.seeds}
    tracker = open_study(RunConfig.model_validate(values), study.folder, ["runs", *(["tuning"] if tried else [])], tried | arms)
    questions = "\n".join(f"- {study.label(one.method)} against {study.label(one.baseline)}" for one in study.comparisons.values())
    size = f"{len(study.arms)} arms, seeds {', '.join(map(str, study.seeds))}"
    tuned = f"; {len(tried)} candidates of {study.tuning.steps} updates, chosen by validation, are under `{study.name}/tuning`" if tried else ""
    tracker.describe(f"**Study {study.name}**: {size}{tuned}.\n\nFixed before looking:\n\n{questions}")
    return tracker


def track_answer(tracker: Tracker, question: str, found: Comparison) -> None:
    """The comparison's tables, and what they say. `question`: its name, "" for the only one."""
    tracker.describe(markdown(found), f"Comparison {question}".strip())
    for name in ("compare", "primary"):
        tracker.log_table(read_columns(found.out / f"{name}.csv"), f"tables/{'-'.join(filter(None, (question, name)))}.json")

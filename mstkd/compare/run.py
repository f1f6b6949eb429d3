"""`mstkd compare`: evaluated runs in, tables, figures and one report out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mstkd.compare import figures
from mstkd.compare.analysis import both, cells, tests, with_mean
from mstkd.compare.arms import Arm, Axes, build_arms, check_arms, choose, common_axes, group, with_references
from mstkd.compare.costs import costs
from mstkd.compare.patients import read_patients
from mstkd.compare.published import PublishedTable, read_published
from mstkd.compare.report import write_report
from mstkd.compare.result import MEAN, ArmSummary, Comparison
from mstkd.compare.runs import FLOOR, ORACLE, EvaluatedRun, check_comparable, read_evaluated_run
from mstkd.compare.statistics import LEVEL, REPLICATES, Replicates, mean_finite, seed_spread
from mstkd.compare.tables import markdown, read_columns, write_tables
from mstkd.errors import UserError
from mstkd.track import open_comparison

Runs = Sequence[Path | str] | Mapping[str, Sequence[Path | str]]


def compare(
    runs: Runs,
    out: Path | str | None = None,
    *,
    baseline: Path | str | None = None,
    primary: Path | str | None = None,
    published: Sequence[str] = (),
    shards: Path | str | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare evaluated runs on the test split of their own data, patient by patient, and write the result into `out`.

    `runs`: run folders, or folders of other evaluations inside them, grouped into arms by their recipes, or {label: folders}. `baseline` and `primary` are an arm's
    label or one of its runs: the first arm, and every other one, by default; with several other arms `primary` names the
    one whose tests were fixed before looking. What is not ranked stands beside the arms: oracles that an evaluation
    scored, and the copy of a given sequence. `published`: tables of papers to print beside ours. `shards`: where the
    test cases' shard set lies now, if not where the runs found it. `seed`: of the bootstrap.

    Writes compare.html, compare.csv, primary.csv and *.png (default `out`: beside the first run) and keeps them in MLflow
    if the first run was tracked. Raises UserError: a run without evaluation, runs of several tasks, other test sets or
    conventions, a patient who was also trained on, arms that differ in more than seed, too few arms, unknown names.
    """
    groups = _read(runs)
    everything = [run for arm_runs in groups.values() for run in arm_runs]
    patient, unchecked = read_patients(everything, shards)
    axes = common_axes(everything, patient)
    tables = [_published(name, axes) for name in published]
    arms = build_arms(with_references(groups), axes)
    base, fixed = _question(arms, baseline, primary)
    arms.sort(key=lambda arm: arm is not base)  # the baseline on top, the others as given
    replicates = Replicates(len(axes.patients), seed)
    comparison = Comparison(
        task=everything[0].task,
        out=Path(out) if out else everything[0].trained.parent / _name(arms, base),
        baseline=base.label,
        arms={arm.label: _summary(arm, axes) for arm in arms},
        patterns=axes.patterns,
        measures=axes.measures,
        cells={(cell.arm, cell.pattern, cell.measure): cell for cell in cells(arms, base, axes, replicates)},
        tests=tuple(tests(arms, base, fixed, axes, replicates)),
        facts=_facts(arms, base, fixed, axes, unchecked, seed),
        conventions=_conventions(everything, axes),
        published=tuple(tables),
    )
    _write(comparison, arms)
    return comparison


def _question(arms: Sequence[Arm], baseline: Path | str | None, primary: Path | str | None) -> tuple[Arm, str | None]:
    """The arm that others are compared with, and the label of the one whose tests were fixed before looking. Raises UserError."""
    base = next((arm for arm in arms if not arm.mark), arms[0]) if baseline is None else _ranked(arms, baseline, "--baseline")
    if primary is None:
        return base, None
    fixed = _ranked(arms, primary, "--primary")
    if fixed is base:
        raise UserError(f"--primary {primary}: that is the baseline; name another arm")
    return base, fixed.label


def _ranked(arms: Sequence[Arm], wanted: Path | str, option: str) -> Arm:
    arm = choose(arms, str(wanted), option)
    if arm.mark:
        raise UserError(f"{option} {wanted}: is not ranked ({arm.mark}), so no test takes it in; name another arm")
    return arm


def _published(name: str, axes: Axes) -> PublishedTable:
    table, ours = read_published(name), [measure.key for measure in axes.measures]
    if not {*ours} & {*table.measures}:
        raise UserError(f"--published {name}: it has {', '.join(table.measures)} and these runs {', '.join(ours)}; choose another table")
    return table


def _conventions(runs: Sequence[EvaluatedRun], axes: Axes) -> dict[str, str]:
    """What figures mean; of a measure that only some runs have, that it is left out."""
    left_out = {key for run in runs for key in run.measured} - {measure.key for measure in axes.measures}
    texts = runs[0].conventions | dict.fromkeys(sorted(left_out), "not compared: only some of the runs measured it")
    return texts | {"mean": f"unweighted mean over {runs[0].task.pattern}s, then over patients; scans of one patient are averaged first"}


def _read(runs: Runs) -> dict[str, list[EvaluatedRun]]:
    """The runs by arm, checked."""
    given = runs if isinstance(runs, Mapping) else {"": runs}
    read = {label: [read_evaluated_run(Path(folder)) for folder in folders] for label, folders in given.items()}
    everything = [run for arm_runs in read.values() for run in arm_runs]
    if not everything:
        raise UserError("mstkd compare: no runs; give at least two run folders")
    check_comparable(everything)
    groups = read if isinstance(runs, Mapping) else group(everything)
    check_arms(groups)
    if len(groups) < 2:
        names = ", ".join(run.name for run in everything)
        raise UserError(f"only one arm: {names} differ in nothing but the seed; give runs of another method or setting")
    return groups


def _write(comparison: Comparison, arms: Sequence[Arm]) -> None:
    comparison.out.mkdir(parents=True, exist_ok=True)
    per_patient = {arm.label: mean_finite(with_mean(arm.scores, arm.patterns)[:, :, -1], axis=0) for arm in arms}
    drawn = figures.draw(comparison, per_patient)
    tables = write_tables(comparison)
    files = [*tables, *drawn.values(), comparison.out / "compare.html"]
    write_report(files[-1], comparison, drawn)
    first = arms[0].runs[0]
    with open_comparison(first.config, first.trained, comparison.out.name) as tracker:
        tracker.set_tags({"baseline": comparison.baseline, "runs": ", ".join(name for arm in comparison.arms.values() for name in arm.runs)})
        for cell in comparison.cells.values():
            if cell.pattern == MEAN:
                values = {f"{comparison.task.metric(cell.measure)}/{cell.arm}": cell.score.value}
                if cell.difference is not None:
                    values[f"difference/{cell.measure}/{cell.arm}"] = cell.difference.value
                tracker.log_metrics(values, 0, "compare")
        tracker.describe(markdown(comparison))
        for path in tables:
            tracker.log_table(read_columns(path), f"tables/{path.stem}.json")
        for path in files:
            tracker.log_artifact(path, "compare")


def _summary(arm: Arm, axes: Axes) -> ArmSummary:
    spread = seed_spread(with_mean(arm.scores, arm.patterns)[:, :, -1])
    return ArmSummary(
        label=arm.label,
        runs=tuple(run.name for run in arm.runs if arm.seeds),
        seeds=arm.seeds,
        patterns=tuple(name for name, has in zip(axes.patterns, arm.patterns, strict=True) if has),
        settings=arm.settings,
        seed_sd=None if spread is None else dict(zip([measure.key for measure in axes.measures], spread.tolist(), strict=True)),
        costs=costs(arm),
        notes=tuple(arm.notes),
        mark=arm.mark,
    )


def _facts(arms: Sequence[Arm], base: Arm, fixed: str | None, axes: Axes, unchecked: Sequence[str], seed: int) -> dict[str, str]:
    """What a reader must know before the figures."""
    run, others = arms[0].runs[0], [arm for arm in arms if arm is not base and not arm.mark]
    facts = {
        "test set": f"test split of {'+'.join(run.data['names'])}: {len(axes.patients)} patients, {len(axes.patient)} scans",
        "unit": "the patient: seeds and scans are averaged first; they are no further observations",
        "interval": f"{LEVEL:g} % percentile bootstrap, {REPLICATES:,} replicates (seed {seed}): patients drawn with replacement, the same ones for "
        "both arms, and each arm's seeds; few seeds understate what another training would change",
        **_families(others, base, fixed, axes),
    }
    if fixed is None and len(others) > 1:
        facts["several arms"] = f"{len(others)} share one baseline; Holm does not reach across arms (--primary names the one fixed before looking)"
    if single := [arm.label for arm in arms if len(arm.seeds) == 1]:
        facts["seeds"] = f"1 seed: seed spread unknown, and not in the intervals, for {', '.join(single)}"
    patterns = f"{run.task.pattern}s"
    for arm in (arm for arm in arms if arm is not base):
        if (common := both(arm, base)) != base.patterns or common != arm.patterns:
            names = [name for name, has in zip(axes.patterns, common, strict=True) if has]
            facts[f"{patterns}, {arm.label}"] = f"differences of means are over the {len(names)} {patterns} that both have: {', '.join(names) or 'none'}"
    if lacking := int(np.isnan(base.scores[0][:, np.asarray(base.patterns), 0]).any(axis=1).sum()):
        facts["missing sequences"] = f"{lacking} patients lack some; their mean is over the {patterns} they have"
    if unchecked:
        facts["overlap"] = f"not checked again for {', '.join(unchecked)} (training data not at hand, or changed); their evaluation checked it"
    if oracles := [arm.label for arm in arms if arm.mark == ORACLE]:
        facts["oracle"] = f"{', '.join(oracles)} used the test cases' labels: neither tested nor ranked"
    if floors := [arm.label for arm in arms if arm.mark == FLOOR]:
        facts["floor"] = f"{', '.join(floors)}: the first given sequence, unchanged, in place of the wanted one: neither tested nor ranked"
    return facts


def _families(others: Sequence[Arm], base: Arm, fixed: str | None, axes: Axes) -> dict[str, str]:
    """Which tests were fixed before looking, and which were not."""
    task, tested = base.runs[0].task, [measure.title for measure in axes.measures if measure.primary]
    explored = [f"single {task.pattern}s", *(measure.title for measure in axes.measures if not measure.primary)]
    return {
        "primary tests": f"mean-over-{task.pattern}s {task.score} of {fixed or ' and '.join(arm.label for arm in others)} against {base.label} in "
        f"{', '.join(tested)}: paired two-sided Wilcoxon signed-rank tests (zeros split), Holm over the {len(tested)} {task.measure}s of an arm",
        "exploratory": f"p values of {', '.join(explored)}, unadjusted" + f"; all tests of other arms than {fixed}" * bool(fixed and len(others) > 1),
    }


def _name(arms: Sequence[Arm], base: Arm) -> str:
    others = [arm.label for arm in arms if arm is not base and arm.mark != FLOOR]
    return f"compare-{figures.slug('-'.join(others)) if len(others) < 3 else f'{len(others)}-arms'}-against-{figures.slug(base.label)}"

"""`mstkd compare`: evaluated runs in, tables, figures and one report out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mstkd.compare import figures
from mstkd.compare.analysis import both, cells, tests, with_mean
from mstkd.compare.arms import Arm, Axes, build_arms, check_arms, choose, common_axes, group
from mstkd.compare.costs import costs
from mstkd.compare.patients import read_patients
from mstkd.compare.published import read_published
from mstkd.compare.report import write_report
from mstkd.compare.result import MEAN, ArmSummary, Comparison
from mstkd.compare.runs import EvaluatedRun, check_comparable, read_run
from mstkd.compare.statistics import LEVEL, REPLICATES, Replicates, mean_known, seed_spread
from mstkd.compare.tables import write_tables
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

    `runs`: run folders, grouped into arms by their recipes, or {label: run folders}. `baseline` and `primary` are an arm's
    label or one of its runs: the first arm, and every other one, by default; with several other arms `primary` names the
    one whose tests were fixed before looking. `published`: tables of papers to print beside ours. `shards`: where the
    test cases' shard set lies now, if not where the runs found it. `seed`: of the bootstrap.

    Writes compare.html, compare.csv, primary.csv and *.png (default `out`: beside the first run) and keeps them in MLflow
    if the first run was tracked. Raises UserError: a run without evaluation, other test sets or conventions, a patient
    who was also trained on, arms that differ in more than seed, too few arms, unknown names.
    """
    groups = _read(runs)
    everything = [run for arm_runs in groups.values() for run in arm_runs]
    tables = [read_published(name) for name in published]
    patient, unchecked = read_patients(everything, Path(shards) if shards else None)
    axes = common_axes(everything, patient)
    arms = build_arms(groups, axes)
    base = choose(arms, str(baseline), "--baseline") if baseline is not None else arms[0]
    arms.sort(key=lambda arm: arm is not base)  # the baseline on top, the others as given
    fixed = choose(arms, str(primary), "--primary").label if primary is not None else None
    if fixed == base.label:
        raise UserError(f"--primary {primary}: that is the baseline; name another arm")
    replicates = Replicates(len(axes.patients), seed)
    comparison = Comparison(
        out=Path(out) if out else everything[0].folder.parent / _name(arms, base),
        baseline=base.label,
        arms={arm.label: _summary(arm, axes) for arm in arms},
        subsets=axes.subsets,
        regions=axes.regions,
        cells={(cell.arm, cell.subset, cell.region): cell for cell in cells(arms, base, axes, replicates)},
        tests=tuple(tests(arms, base, fixed, axes, replicates)),
        facts=_facts(arms, base, fixed, axes, unchecked, seed),
        conventions=everything[0].conventions | {"mean": "unweighted mean over subsets, then over patients; scans of one patient are averaged first"},
        published=tuple(tables),
    )
    _write(comparison, arms)
    return comparison


def _read(runs: Runs) -> dict[str, list[EvaluatedRun]]:
    """The runs by arm, checked."""
    given = runs if isinstance(runs, Mapping) else {"": runs}
    read = {label: [read_run(Path(folder)) for folder in folders] for label, folders in given.items()}
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
    per_patient = {arm.label: mean_known(with_mean(arm.dice, arm.subsets)[:, :, -1], axis=0) for arm in arms}
    drawn = figures.draw(comparison, per_patient)
    files = [*write_tables(comparison), *drawn.values(), comparison.out / "compare.html"]
    write_report(files[-1], comparison, drawn)
    first = arms[0].runs[0]
    with open_comparison(first.config, first.folder, comparison.out.name) as tracker:
        tracker.set_tags({"baseline": comparison.baseline, "runs": ", ".join(name for arm in comparison.arms.values() for name in arm.runs)})
        for cell in comparison.cells.values():
            if cell.subset == MEAN:
                values = {f"dice/{cell.region}/{cell.arm}": cell.dice.value}
                if cell.difference is not None:
                    values[f"difference/{cell.region}/{cell.arm}"] = cell.difference.value
                tracker.log_metrics(values, 0, "compare")
        for path in files:
            tracker.log_artifact(path, "compare")


def _summary(arm: Arm, axes: Axes) -> ArmSummary:
    spread = seed_spread(with_mean(arm.dice, arm.subsets)[:, :, -1])
    return ArmSummary(
        label=arm.label,
        runs=tuple(run.name for run in arm.runs),
        seeds=arm.seeds,
        subsets=tuple(name for name, has in zip(axes.subsets, arm.subsets, strict=True) if has),
        settings=arm.settings,
        seed_sd=None if spread is None else dict(zip(axes.regions, spread.tolist(), strict=True)),
        costs=costs(arm),
        notes=tuple(arm.notes),
        oracle=arm.oracle,
    )


def _facts(arms: Sequence[Arm], base: Arm, fixed: str | None, axes: Axes, unchecked: Sequence[str], seed: int) -> dict[str, str]:
    """What a reader must know before the figures."""
    run, regions = arms[0].runs[0], ", ".join(axes.regions)
    others = [arm for arm in arms if arm is not base and not arm.oracle]
    family = fixed or " and ".join(arm.label for arm in others)
    facts = {
        "test set": f"test split of {'+'.join(run.data['names'])}: {len(axes.patients)} patients, {len(axes.patient)} scans",
        "unit": "the patient: seeds and scans are averaged first; they are no further observations",
        "interval": f"{LEVEL:g} % percentile bootstrap, {REPLICATES:,} replicates (seed {seed}): patients drawn with replacement, the same ones for "
        "both arms, and each arm's seeds; few seeds understate what another training would change",
        "primary tests": f"mean-over-subsets Dice of {family} against {base.label} in {regions}: paired two-sided Wilcoxon signed-rank tests "
        f"(zeros split), Holm over the {len(axes.regions)} regions of an arm",
        "exploratory": "p values of single subsets, unadjusted" + f"; all tests of other arms than {fixed}" * bool(fixed and len(others) > 1),
    }
    if fixed is None and len(others) > 1:
        facts["several arms"] = f"{len(others)} share one baseline; Holm does not reach across arms (--primary names the one fixed before looking)"
    if single := [arm.label for arm in arms if len(arm.seeds) == 1]:
        facts["seeds"] = f"1 seed: seed spread unknown, and not in the intervals, for {', '.join(single)}"
    for arm in others:
        if (common := both(arm, base)) != base.subsets or common != arm.subsets:
            names = [name for name, has in zip(axes.subsets, common, strict=True) if has]
            facts[f"subsets, {arm.label}"] = f"differences of means are over the {len(names)} subsets that both have: {', '.join(names) or 'none'}"
    if lacking := int(np.isnan(base.dice[0][:, np.asarray(base.subsets), 0]).any(axis=1).sum()):
        facts["missing sequences"] = f"{lacking} patients lack some; their mean is over the subsets they have"
    if unchecked:
        facts["overlap"] = f"not checked again for {', '.join(unchecked)} (training data not at hand, or changed); their evaluation checked it"
    if ours := [arm.label for arm in arms if arm.oracle]:
        facts["oracle"] = f"{', '.join(ours)} used the test cases' labels: neither tested nor ranked"
    return facts


def _name(arms: Sequence[Arm], base: Arm) -> str:
    others = [arm.label for arm in arms if arm is not base]
    return f"compare-{figures.slug('-'.join(others)) if len(others) < 3 else f'{len(others)}-arms'}-against-{figures.slug(base.label)}"

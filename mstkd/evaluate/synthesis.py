"""Completed sequences against the true ones: PSNR and SSIM by pattern, `per_case.csv` and `summary.json`.

A pattern says which sequences are given and which one is looked at, e.g. "t1+t2->flair". Letters: K slices, S pixels per axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from skimage.metrics import structural_similarity
from torch import Tensor

from mstkd.config import IntensityConfig, SliceConfig
from mstkd.errors import UserError
from mstkd.evaluate.completion import Completer, Slices
from mstkd.evaluate.inference import evaluation_mode
from mstkd.evaluate.kept import KeptScores
from mstkd.evaluate.metrics import bounding_box, region_masks
from mstkd.evaluate.perceptual import Distance, perceptual_distance
from mstkd.evaluate.sharing import score_each
from mstkd.evaluate.source import CaseSource
from mstkd.evaluate.summary import mean_cell, mean_known
from mstkd.evaluate.texture import radial_spectrum, spectrum_error, z_gradient_error
from mstkd.files import write_csv
from mstkd.measures import COMPLETION, LIKENESS, TEXTURE
from mstkd.subsets import Subset, all_subsets, part_of, subset_name

WINDOW = 11  # pixels per axis of SSIM's
REACH = WINDOW // 2  # of a window beyond its centre
WHOLE = (slice(None), slice(None))  # slice
IDENTICAL_DB = 100.0  # PSNR of identical images, which has no end
COUNTS = ("n", "local_n")
COPY = "copy"  # in place of a network: the first of the given sequences, taken for the one that is missing

Image = NDArray[np.float32]  # (S, S) in [0, 1]
Box = tuple[slice, slice]


@dataclass(frozen=True)
class Likeness:
    """How like the true sequence a completed one is: means over the slices of a case; None where nothing was measured."""

    slices: int
    psnr: float  # dB
    ssim: float
    brain_psnr: float | None = None  # in the rectangle round the brain
    brain_ssim: float | None = None
    local_slices: int = 0  # those that show WT
    local_psnr: float | None = None  # in the rectangle round WT
    local_ssim: float | None = None
    z_gradient: float | None = None  # error of the gradient through the slices, per step, in the brain
    spectrum_db: float | None = None  # log-spectral distance
    lpips: float | None = None


@dataclass(frozen=True)
class Completion:
    """One score: a network on a case, for one of the sequences that were not given."""

    network: str
    subject: str
    given: str
    target: str
    score: Likeness

    @property
    def pattern(self) -> str:
        return f"{self.given}->{self.target}"


def psnr(image: Image, truth: Image) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]: 10 log10(1 / mean squared error); at most IDENTICAL_DB."""
    return _ratio(float(_squared_error(image, truth).mean()))


def ssim(image: Image, truth: Image) -> float:
    """Structural similarity (Wang et al., IEEE TIP 2004) of images, or volumes, in [0, 1], at least WINDOW pixels per axis.

    Gaussian window of 11 pixels per axis, sigma 1.5, K1 0.01, K2 0.03; mean over the windows that lie inside the image.
    """
    return float(_ssim_map(image, truth)[_inner((slice(None),) * image.ndim)].mean())


def _squared_error(image: Image, truth: Image) -> NDArray[np.float64]:
    return np.square(image.astype(np.float64) - truth)


def _ratio(error: float) -> float:
    """PSNR of a mean squared error."""
    return min(10 * float(np.log10(1 / error)), IDENTICAL_DB) if error else IDENTICAL_DB


def _ssim_map(image: Image, truth: Image) -> NDArray[np.float64]:
    """SSIM of the window round each pixel; of those nearer than REACH to an edge a part lies outside."""
    # in float32 the rounding of variances shows beside K2 where an image is flat
    image, truth = image.astype(np.float64), truth.astype(np.float64)
    options = dict(data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return structural_similarity(image, truth, full=True, **options)[1]


def _inner(box: Box) -> Box:
    """The pixels whose windows lie inside `box`."""
    return tuple(slice((side.start or 0) + REACH, -REACH if side.stop is None else side.stop - REACH) for side in box)


def rectangle(mask: NDArray[np.bool_]) -> Box | None:
    """The smallest rectangle round a mask (S, S), sides under WINDOW pixels grown to it inside the image; None round nothing."""
    if not mask.any():
        return None
    return tuple(_grown(side, size) for side, size in zip(bounding_box(mask), mask.shape, strict=True))


def _grown(side: slice, size: int) -> slice:
    short = max(WINDOW - (side.stop - side.start), 0)
    start = min(max(side.start - short // 2, 0), size - (side.stop - side.start) - short)
    return slice(start, start + (side.stop - side.start) + short)


def whole_tumour(case: Slices, source: CaseSource) -> NDArray[np.bool_]:
    """WT (K, S, S) of a case; empty where it has no label, or its set no such region."""
    scheme = source.label_scheme
    if case.label is None or scheme is None or "WT" not in scheme.regions:
        return np.zeros(case.brain.shape, bool)
    return region_masks(case.label.numpy(), scheme)["WT"]


@dataclass(frozen=True)
class Truth:
    """What completed slices of a case are measured against, with the work that no completion changes done once."""

    case: Slices
    images: Tensor  # (K, M, S, S) in [0, 1]
    brain: list[Box | None]  # by slice
    local: list[Box | None]

    @classmethod
    def of(cls, completer: Completer, case: Slices, source: CaseSource) -> "Truth":
        boxes = ([rectangle(mask) for mask in masks] for masks in (case.brain.numpy(), whole_tumour(case, source)))
        return cls(case, completer.unit(case.image), *boxes)

    @cached_property
    def spectra(self) -> NDArray[np.float64]:
        """(K, M, S // 2)."""
        return radial_spectrum(self.images.numpy())

    def likeness(self, completed: Tensor, channel: int, regions: bool, distance: Distance | None) -> Likeness:
        """Of channel `channel` of the completed stack (K, M, S, S); without `regions` over whole slices alone."""
        made, true = completed[:, channel].numpy(), self.images[:, channel].numpy()
        pairs = list(zip(made, true, strict=True))
        maps = [(_squared_error(*pair), _ssim_map(*pair)) for pair in pairs]  # once, whatever part is looked at
        whole = _means(maps, [WHOLE] * len(maps))
        if not regions:
            return Likeness(len(maps), *whole)
        far = distance and float(np.mean(distance(completed[:, channel], self.images[:, channel])))
        shown = len([box for box in self.local if box is not None])
        texture = (
            z_gradient_error(made, true, self.case.brain.numpy(), self.case.position),
            float(spectrum_error(radial_spectrum(made), self.spectra[:, channel]).mean()),
        )
        return Likeness(len(maps), *whole, *_means(maps, self.brain), shown, *_means(maps, self.local), *texture, far)


def _means(maps: Sequence[tuple[NDArray, NDArray]], boxes: Sequence[Box | None]) -> tuple[float | None, float | None]:
    """PSNR and SSIM inside each slice's box, averaged over the slices that have one; `maps`: squared error and SSIM by slice."""
    found = [(_ratio(float(error[box].mean())), float(likeness[_inner(box)].mean())) for (error, likeness), box in zip(maps, boxes, strict=True) if box]
    return tuple(np.mean(found, axis=0).tolist()) if found else (None, None)


def score_completions(
    completer: Completer, networks: Sequence[str], source: CaseSource, subjects: Sequence[str], subsets: Sequence[Subset],
    regions: bool = True, rank: int = 0, world: int = 1, stopping: Callable[[], bool] | None = None,
    kept: KeptScores[Completion] | None = None,
) -> list[Completion]:  # fmt: skip
    """Scores of every subject x network x subset x sequence outside it, the same on every rank and for any number of ranks.

    A pattern is left out for a case that lacks one of its sequences. COPY among the networks is the floor to beat. Without `regions`
    whole slices alone (cheap, for validation). Collective with several ranks. `stopping` as in `shared_out`, `kept` as in `score_each`.
    Raises UserError: an oracle is asked for and a case has no label.
    """
    distance = perceptual_distance(completer.device) if regions else None
    with evaluation_mode(completer.method):
        return score_each(subjects, lambda key: _score_case(completer, networks, source, key, subsets, regions, distance), rank, world, stopping, kept)


def _score_case(completer, networks, source, key, subsets, regions, distance) -> list[Completion]:
    case, sequences = completer.slices(source.subject(key)), completer.sequences
    truth = Truth.of(completer, case, source)
    scored = []
    for network in networks:
        for subset in (subset for subset in subsets if part_of(subset, case.present)):
            targets = [m for m, (given, here) in enumerate(zip(subset, case.present, strict=True)) if here and not given]
            if not targets:
                continue
            given = subset_name(sequences, subset)
            completed = copied(truth.images, subset) if network == COPY else completer.complete(network, case, subset)
            for m in targets:
                score = truth.likeness(completed, m, regions, distance)
                scored.append(Completion(network, key, given, sequences[m], score))
    return scored


def copied(images: Tensor, subset: Subset) -> Tensor:
    """(K, M, S, S): the first sequence of `subset` in place of every one that is not in it."""
    first = subset.index(True)
    return images.where(images.new_tensor(subset, dtype=bool)[:, None, None], images[:, first : first + 1])


def conventions(slices: SliceConfig, intensity: IntensityConfig, perceptual: bool) -> dict[str, str]:
    """What the figures mean, in words; printed under every table."""
    return {
        "images": f"axial slices of {slices.size} x {slices.size} pixels with at least {100 * slices.min_brain:g} % brain, completed and true, "
        f"in the method's intensities ({intensity.kind}{f' {intensity.percentile}' * (intensity.kind == 'percentile')}), clipped and mapped to [0, 1]; "
        "never 8-bit files",
        "psnr": f"10 log10(1 / mean squared error) in dB, at most {IDENTICAL_DB:g}; mean over the slices of a case, then over cases",
        "ssim": "range 1, Gaussian window of 11 x 11, sigma 1.5, mean over the windows inside the image; slices and cases as for psnr",
        "local": "in the smallest rectangle round WT in that slice, sides under 11 pixels grown to 11; slices without WT are left out, local_n cases have some",
        "brain": "in the smallest rectangle round the brain in that slice",
        "z_gradient": "mean absolute difference between the gradients through the slices of completed and true images, per step from a slice to the next, "
        "in the brain; flicker raises it; lower is better",
        "spectrum_db": "root mean square over rings of spatial frequency of the difference in dB between the slices' power spectra; blur and noise raise "
        "it; lower is better",
        "lpips": "AlexNet, images repeated to three channels in [-1, 1]; lower is better"
        if perceptual
        else "not measured: the package lpips and the weights of AlexNet are not installed here, and nothing is downloaded",
        "pattern": "given -> target; what is given is never scored, and cases that lack one of its sequences are left out",
        "mean": "unweighted mean over patterns of the means over cases; counts are summed; by_missing: over patterns with so many sequences not given",
    }


def summarise_completions(
    completions: Sequence[Completion], sequences: Sequence[str], method: str, split: str, fold: int, oracle: bool, conventions: dict[str, str]
) -> dict[str, Any]:
    """The content of `summary.json` for the scores of one network, marked if it is an `oracle`. A mean over no case is None.

    Raises UserError if there is no score, or one that is not a number.
    """
    cells = pattern_scores(completions, sequences)
    if not cells:
        raise UserError(f"split {split}: no case has both the sequences that the method is given and another one to compare with; choose other data")
    for row in completions:
        if np.isnan(row.score.psnr):
            raise UserError(f"network {row.network}: what it makes of case {row.subject} from {row.given} is not a number; look at the loss of its training")
    texture = [m.key for m in TEXTURE if all(getattr(row.score, m.key) is not None for row in completions)]
    patterns = {pattern: _cell(scores, texture) for pattern, scores in cells.items()}
    missing: dict[int, list[dict]] = {}
    for pattern, cell in patterns.items():
        missing.setdefault(len(sequences) - len(pattern.partition("->")[0].split("+")), []).append(cell)
    return {
        "method": method, "split": split, "fold": fold, **({"oracle": True} if oracle else {}), "patterns": patterns,
        "by_missing": {str(count): mean_cell(missing[count], COUNTS) for count in sorted(missing)},
        "mean": mean_cell(list(patterns.values()), COUNTS), "conventions": conventions,
    }  # fmt: skip


def pattern_scores(completions: Sequence[Completion], sequences: Sequence[str]) -> dict[str, list[Likeness]]:
    """Pattern -> scores of its cases; patterns by subset in their usual order, then by target in the data set's."""
    cells: dict[str, list[Likeness]] = {}
    for row in completions:
        cells.setdefault(row.pattern, []).append(row.score)
    usual = [f"{subset_name(sequences, subset)}->{target}" for subset in all_subsets(sequences) for target in sequences]
    return {pattern: cells[pattern] for pattern in usual if pattern in cells}


def _cell(scores: Sequence[Likeness], texture: Sequence[str]) -> dict[str, float | int | None]:
    cell = {key: mean_known([getattr(score, key) for score in scores]) for key in (m.key for m in LIKENESS)}
    cell |= {"n": len(scores), "local_n": sum(score.local_slices > 0 for score in scores)}
    return cell | {key: mean_known([getattr(score, key) for score in scores]) for key in ("brain_psnr", "brain_ssim", *texture)}


def write_completions(path: Path, completions: Sequence[Completion]) -> None:
    """`per_case.csv`: one line per network x case x pattern; an empty field was not measured."""
    columns = ("network", "subject", "pattern", *Likeness.__dataclass_fields__)
    write_csv(path, columns, ((row.network, row.subject, row.pattern, *vars(row.score).values()) for row in completions))


def print_likeness(summary: dict[str, Any], title: str, console: Console | None = None) -> None:
    """One line per pattern: PSNR in dB and SSIM, of whole slices and round the tumour; the conventions below."""
    console = console or Console()
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("pattern", no_wrap=True)
    headings = [measure.title if measure.local else measure.unit.heading for measure in COMPLETION if measure.key in summary["mean"]]
    for heading in (*headings, "cases"):
        table.add_column(heading.replace(" ", "\n"), justify="right")
    for name, cell in summary["patterns"].items():
        table.add_row(name, *_texts(cell), str(cell["n"]))
    table.add_section()
    table.add_row("mean", *_texts(summary["mean"]), "", style="bold")
    console.print(table)
    for key, text in summary["conventions"].items():
        console.print(f"{key}: {text}", style="dim", highlight=False, markup=False)


def _texts(cell: dict[str, float | int | None]) -> list[str]:
    return [measure.unit.dashed(cell[measure.key]) for measure in COMPLETION if measure.key in cell]

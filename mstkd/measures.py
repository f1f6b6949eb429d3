"""What is measured: measures with their units, as figures are stored, read and shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan


@dataclass(frozen=True)
class Estimate:
    """A mean or a difference with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Unit:
    """How stored figures are shown. Every text of something unknown (None, NaN) is empty."""

    heading: str
    change: str = ""  # what differences are counted in
    digits: int = 1
    factor: float = 1.0  # what is shown is so many times what is stored
    colours_end: float = 1.0  # of a map of differences, at least, as shown: noise should not look strong
    larger_is_better: bool = True
    signs: bool = False  # shown with a sign

    def shown(self, value: float) -> float:
        return self.factor * value

    def text(self, value: float | None) -> str:
        return "" if value is None or isnan(value) else f"{self.shown(value):{'+' * self.signs}.{self.digits}f}"

    def dashed(self, value: float | None) -> str:
        """As `text`, but something unknown is a dash."""
        return self.text(value) or "-"

    def signed(self, value: float) -> str:
        return f"{self.shown(value):+.{self.digits}f}"

    def span(self, estimate: Estimate) -> str:
        return f"[{self.text(estimate.low)}, {self.text(estimate.high)}]"

    def signed_span(self, estimate: Estimate) -> str:
        return f"[{self.signed(estimate.low)}, {self.signed(estimate.high)}]"

    def difference(self, estimate: Estimate | None) -> str:
        """A difference with its interval."""
        return "" if estimate is None else f"{self.signed(estimate.value)} {self.signed_span(estimate)}"


@dataclass(frozen=True)
class Measure:
    """What tables and figures are about."""

    key: str  # in files
    title: str  # in reports
    unit: Unit
    beside: Unit | None = None  # of the figure that a comparison shows beside it and does not compare
    primary: bool = True  # its mean is of the family of tests that is fixed before looking; pages show it at once, the others folded
    local: bool = False  # round the tumour, on the slices that show it
    ends: tuple[float, float] | None = None  # of a page's colours, as stored; None: those of the figures, the smallest 0 where less is better


DICE = Unit("Dice %", "Dice, percentage points", factor=100)
HD95 = Unit("HD95 mm", larger_is_better=False)
ASSD = Unit("ASSD mm", larger_is_better=False)
ACCURACY = Unit("accuracy %", factor=100)
AUC = Unit("AUC", digits=3)
PSNR = Unit("PSNR dB", "PSNR, dB", digits=2, colours_end=0.1)
SSIM = Unit("SSIM", "SSIM", digits=4, colours_end=0.005)
Z_GRADIENT = Unit("z gradient", "z gradient", digits=4, colours_end=0.005, larger_is_better=False)
SPECTRUM = Unit("spectrum dB", "spectrum, dB", digits=2, colours_end=0.1, larger_is_better=False)
LPIPS = Unit("LPIPS", "LPIPS", digits=4, colours_end=0.005, larger_is_better=False)

LIKENESS = (  # of a completed sequence
    Measure("psnr", "PSNR", PSNR),
    Measure("ssim", "SSIM", SSIM),
    Measure("local_psnr", "local PSNR", PSNR, primary=False, local=True),
    Measure("local_ssim", "local SSIM", SSIM, primary=False, local=True),
)
TEXTURE = (  # of one, too; older evaluations did not measure it
    Measure("z_gradient", "z gradient", Z_GRADIENT, primary=False),
    Measure("spectrum_db", "spectrum", SPECTRUM, primary=False),
    Measure("lpips", "LPIPS", LPIPS, primary=False),
)
COMPLETION = LIKENESS + TEXTURE


def overlap_in(regions: Sequence[str]) -> tuple[Measure, ...]:
    """Dice of each region, HD95 beside it."""
    return tuple(Measure(region, region, DICE, HD95) for region in regions)

"""Signal equations of the phantom: from relaxation times to what a scanner shows.

Times in ms, proton density relative to water, gadolinium concentration in mmol/l. Signals are relative to
the fully relaxed signal of water, so they lie in 0..1.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

WATER_A, WATER_B_MS = 0.892, 453.0  # 1/PD = a + b/T1
RELAXIVITY_PER_MS = 0.0045  # of gadolinium at 3T: 4.5 l/mmol/s


@dataclass(frozen=True)
class Tissue:
    """Relaxation times in ms and proton density; numbers or arrays of one shape."""

    t1_ms: ArrayLike
    t2_ms: ArrayLike
    density: ArrayLike

    def scaled(self, t1: float, t2: float) -> "Tissue":
        """The same tissue with its times multiplied by `t1` and `t2`."""
        return replace(self, t1_ms=self.t1_ms * t1, t2_ms=self.t2_ms * t2)

    def wetter(self, factor: ArrayLike) -> "Tissue":
        """With more free water (less, if `factor` < 1): both times are multiplied, and PD follows T1 at 3T.

        1/PD = a + b/T1 (form: Volz et al. 2012, NeuroImage 63:540), fitted to `TISSUES_3T`; a table value is kept
        at factor 1.
        """
        dry, wet = (WATER_A + WATER_B_MS / t1 for t1 in (self.t1_ms, self.t1_ms * factor))
        return Tissue(self.t1_ms * factor, self.t2_ms * factor, self.density * dry / wet)

    def enhanced(self, concentration_mmol_l: ArrayLike) -> "Tissue":
        """After contrast agent: 1/T1' = 1/T1 + 0.0045 C."""
        return replace(self, t1_ms=1 / (1 / self.t1_ms + RELAXIVITY_PER_MS * concentration_mmol_l))


TISSUES_3T = {
    "csf": Tissue(4000.0, 1500.0, 1.00),
    "gm": Tissue(1400.0, 95.0, 0.82),
    "wm": Tissue(850.0, 75.0, 0.70),
    "oedema": Tissue(1600.0, 150.0, 0.85),
    "necrosis": Tissue(2500.0, 300.0, 0.92),
    "enhancing": Tissue(1500.0, 110.0, 0.84),
    "nonenhancing": Tissue(1450.0, 130.0, 0.84),
    "hyperintensity": Tissue(1300.0, 125.0, 0.80),  # leukoaraiosis: milder than oedema
    "choroid": Tissue(1500.0, 120.0, 0.84),
    "vessel": Tissue(1650.0, 60.0, 0.80),
}
TISSUES_7T = {
    "csf": Tissue(4300.0, 1000.0, 1.00),
    "gm": Tissue(1950.0, 60.0, 0.82),
    "wm": Tissue(1200.0, 50.0, 0.70),
    "oedema": Tissue(2000.0, 100.0, 0.85),
    "necrosis": Tissue(2800.0, 200.0, 0.92),
    "enhancing": Tissue(1900.0, 75.0, 0.84),
}


def spin_echo(tissue: Tissue, tr_ms: float, te_ms: float) -> ArrayLike:
    """S = PD (1 - exp(-TR/T1)) exp(-TE/T2), in the shape of the tissue's times."""
    return tissue.density * (1 - np.exp(-tr_ms / tissue.t1_ms)) * np.exp(-te_ms / tissue.t2_ms)


def inversion_recovery(tissue: Tissue, tr_ms: float, te_ms: float, ti_ms: float) -> ArrayLike:
    """S = |PD (1 - 2 exp(-TI/T1) + exp(-TR/T1)) exp(-TE/T2)|, in the shape of the tissue's times."""
    recovery = 1 - 2 * np.exp(-ti_ms / tissue.t1_ms) + np.exp(-tr_ms / tissue.t1_ms)
    return np.abs(tissue.density * recovery * np.exp(-te_ms / tissue.t2_ms))


def nulling_ti_ms(t1_ms: float, tr_ms: float) -> float:
    """The inversion time at which `inversion_recovery` of a tissue with `t1_ms` vanishes."""
    return t1_ms * (np.log(2) - np.log1p(np.exp(-tr_ms / t1_ms)))


def signal(sequence: str, tissue: Tissue, concentration_mmol_l: ArrayLike = 0.0) -> ArrayLike:
    """Signal of `tissue` in one of the sequences flair, t1, t1ce, t2 (3T), t1_3t, t1_7t.

    Contrast agent acts on t1ce alone: the other scans are taken before it. The T1-weighted inversion
    recoveries null CSF at their own field strength, which puts WM above GM above CSF.
    """
    match sequence:
        case "flair":
            return inversion_recovery(tissue, tr_ms=9000, te_ms=110, ti_ms=2500)
        case "t1":
            return spin_echo(tissue, tr_ms=600, te_ms=10)
        case "t1ce":
            return spin_echo(tissue.enhanced(concentration_mmol_l), tr_ms=600, te_ms=10)
        case "t2":
            return spin_echo(tissue, tr_ms=4500, te_ms=100)
        case "t1_3t":
            return inversion_recovery(tissue, 2500, 3, nulling_ti_ms(TISSUES_3T["csf"].t1_ms, 2500))
        case "t1_7t":
            return inversion_recovery(tissue, 3500, 3, nulling_ti_ms(TISSUES_7T["csf"].t1_ms, 3500))
    raise ValueError(f"no signal equation for sequence {sequence!r}")

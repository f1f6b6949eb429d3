"""What an error pixel by pixel does not show: flicker from slice to slice, and what completion took from the spectrum, or added to it.

Letters: K axial slices, S pixels per axis.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

FLOOR = 1 / (12 * 255**2)  # power that rounding to 256 grey levels adds at every frequency: what lies below it is not seen


def z_gradient_error(images: NDArray, truth: NDArray, brain: NDArray[np.bool_], position: Sequence[int]) -> float | None:
    """Mean absolute difference between the through-plane gradients of `images` (K, S, S) and `truth`, per step from slice to slice.

    Over pixels that are `brain` (K, S, S) on both sides of a step between neighbouring slices, whose `position` (K) differs by 1; None if there
    is none. An error that all slices share does not count; noise that every slice draws for itself does.
    """
    error = images.astype(np.float64) - truth
    inside = brain[1:] & brain[:-1] & (np.diff(position) == 1)[:, None, None]
    return float(np.abs(np.diff(error, axis=0))[inside].mean()) if inside.any() else None


def radial_spectrum(images: NDArray) -> NDArray[np.float64]:
    """Mean power of the orthonormal DFT of images (..., S, S) over rings of 1, 2, ... S // 2 cycles per image, (..., S // 2).

    Durall et al., CVPR 2020 (arXiv:2003.01826), equation 7, as a mean; without the mean grey value, which is no texture.
    """
    size = images.shape[-1]
    power = np.square(np.abs(np.fft.fft2(images.astype(np.float64), norm="ortho"))).reshape(*images.shape[:-2], size * size)
    rings = _rings(size)
    return np.stack([power[..., rings == ring].mean(-1) for ring in range(1, size // 2 + 1)], axis=-1)


def spectrum_error(spectrum: NDArray, truth: NDArray) -> NDArray[np.float64]:
    """Log-spectral distance in dB of spectra (..., S // 2) in [0, 1] images: the root mean square of 10 log10 of their ratio over the rings.

    Gray and Markel, IEEE TASSP 1976. Blur and noise both raise it; to both powers FLOOR is added.
    """
    ratio = 10 * np.log10((spectrum + FLOOR) / (truth + FLOOR))
    return np.sqrt(np.square(ratio).mean(-1))


@cache
def _rings(size: int) -> NDArray[np.intp]:
    """The ring of every frequency of an S x S DFT, flat: its distance from 0, rounded."""
    frequencies = np.fft.fftfreq(size, 1 / size)
    return np.rint(np.hypot(frequencies[:, None], frequencies)).astype(np.intp).ravel()

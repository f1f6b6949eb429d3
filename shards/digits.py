"""The phantom of classification: spoken and written digits, generated, as PNG and WAV files in folders by class.

A digit is drawn in seven segments, one of which is often lost, and spoken as a syllable of formants and noise, part of
which is drowned. So each view leaves some classes open (8 without a segment may be 0, 6 or 9; "five" and "nine" share
their vowel) and the two together decide most of them. A subject is a function of (seed, index) alone.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import wavfile

from mstkd.errors import UserError

SIDE = 28  # pixels
RATE_HZ = 8000
SEGMENTS = {  # of a display one wide and two high, centred: ends as (x, y), y downwards
    "a": ((-0.5, -1), (0.5, -1)), "b": ((0.5, -1), (0.5, 0)), "c": ((0.5, 0), (0.5, 1)), "d": ((-0.5, 1), (0.5, 1)),
    "e": ((-0.5, 0), (-0.5, 1)), "f": ((-0.5, -1), (-0.5, 0)), "g": ((-0.5, 0), (0.5, 0)),
}  # fmt: skip
DRAWN = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")
LOST_SHARE = 0.6  # of the images lack a segment
PIXEL_NOISE = 0.25  # standard deviation, of a stroke's brightness

NOISES_HZ = {"z": (2500, 3900, 0.5), "t": (1800, 3900, 0.8), "th": (1200, 3900, 0.15), "f": (900, 3900, 0.15), "s": (3000, 3900, 0.8), "v": (500, 1500, 0.15)}
NASAL_HZ = ((250, 1100), (250, 1100))
Vowel = tuple[tuple[int, int], tuple[int, int]]  # the first two formants in Hz at the beginning and at the end
SPOKEN: tuple[tuple[str, Vowel, str], ...] = (  # before the vowel, the vowel, after it
    ("z", ((300, 2300), (500, 900)), ""), ("", ((320, 800), (640, 1200)), "n"), ("t", ((320, 1000), (320, 900)), ""),
    ("th", ((320, 1900), (300, 2300)), ""), ("f", ((570, 840), (500, 1300)), ""), ("f", ((730, 1100), (400, 2000)), "v"),
    ("s", ((400, 2000), (400, 2000)), "s"), ("s", ((530, 1850), (500, 1500)), "n"), ("", ((500, 1850), (330, 2300)), "t"),
    ("n", ((730, 1100), (400, 2000)), "n"),
)  # fmt: skip
CONSONANT_S, VOWEL_S, DROWNED_S = 0.1, 0.25, 0.25
FORMANT_WIDTH_HZ = 120


@dataclass(frozen=True)
class Digit:
    """One generated subject."""

    name: str
    digit: int
    image: NDArray[np.uint8]  # (rows, columns)
    audio: NDArray[np.int16]  # RATE_HZ


def write_digits(out: Path, subjects: int = 1500, seed: int = 0) -> list[str]:
    """Write `out/images/<digit>/<subject>.png` and `out/audio/<digit>/<subject>.wav`; returns the subjects' names.

    Same arguments, same pixels and samples. `out` appears only when complete. Raises UserError if it exists already or
    an argument is out of range.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out or remove it")
    if subjects < 1 or seed < 0:
        raise UserError(f"subjects {subjects}, seed {seed}: give at least one subject and a seed of 0 or more")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        unfinished = Path(folder) / "digits"
        for view in ("images", "audio"):
            for digit in range(len(DRAWN)):
                (unfinished / view / str(digit)).mkdir(parents=True)
        names = []
        for index in range(subjects):
            made = make_digit(index, seed)
            Image.fromarray(made.image).save(unfinished / "images" / str(made.digit) / f"{made.name}.png")
            wavfile.write(unfinished / "audio" / str(made.digit) / f"{made.name}.wav", RATE_HZ, made.audio)
            names.append(made.name)
        unfinished.rename(out)
    return names


def make_digit(index: int, seed: int = 0) -> Digit:
    """Subject `index` of the cohort of that seed; digits come in turn."""
    digit = index % len(DRAWN)
    return Digit(f"digit_{index:05d}", digit, draw_image(digit, np.random.default_rng((seed, index, 0))), speak(digit, np.random.default_rng((seed, index, 1))))


def draw_image(digit: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(SIDE, SIDE): the digit's segments under a random affine map, often one lost, with noise."""
    lit = list(DRAWN[digit])
    if rng.random() < LOST_SHARE:
        lit.pop(rng.integers(len(lit)))
    angle, shear, size = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.2, 0.2), rng.uniform(6.5, 8.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.array([[1, shear], [0, 1]])
    ends = size * np.array([SEGMENTS[name] for name in lit]) @ turn.T + (SIDE - 1) / 2 + rng.uniform(-2.5, 2.5, 2)
    rows, columns = np.indices((SIDE, SIDE))
    points = np.stack([columns, rows], axis=-1).reshape(-1, 2)
    distance = np.min([_distance(points, start, end) for start, end in ends], axis=0).reshape(SIDE, SIDE)
    strokes = np.clip(rng.uniform(1.0, 1.8) + 0.5 - distance, 0, 1)  # one pixel wide at its edge
    noisy = rng.uniform(0.6, 1) * strokes + rng.normal(0, PIXEL_NOISE, strokes.shape)
    return np.round(255 * np.clip((noisy + 0.5) / 2, 0, 1)).astype(np.uint8)


def speak(digit: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """The digit's syllable by a random voice, at RATE_HZ, in noise and partly drowned."""
    before, vowel, after = SPOKEN[digit]
    pitch_hz, throat = rng.uniform(90, 220), rng.uniform(0.88, 1.14)  # formants scale with the length of the vocal tract
    parts = [_consonant(name, pitch_hz, throat, rng) for name in (before, after)]
    voice = np.concatenate([parts[0], _voiced(vowel, VOWEL_S * rng.uniform(0.8, 1.2), pitch_hz, throat), parts[1]])
    audio = np.zeros(RATE_HZ)  # one second
    start = rng.integers(len(audio) - len(voice) + 1)
    audio[start : start + len(voice)] = voice
    audio += rng.normal(0, rng.uniform(0.1, 0.3), len(audio))
    drowned = start + rng.integers(max(len(voice) - round(RATE_HZ * DROWNED_S), 1))
    part = audio[drowned : drowned + round(RATE_HZ * DROWNED_S)]
    part += rng.normal(0, 1, len(part))
    return np.round(6000 * np.clip(audio, -5, 5)).astype(np.int16)


def _distance(points: NDArray, start: NDArray, end: NDArray) -> NDArray:
    """From points (N, 2) to the straight line between two ends."""
    along = end - start
    share = np.clip((points - start) @ along / (along @ along), 0, 1)
    return np.linalg.norm(points - start - share[:, None] * along, axis=1)


def _consonant(name: str, pitch_hz: float, throat: float, rng: np.random.Generator) -> NDArray:
    if not name:
        return np.zeros(0)
    if name == "n":
        return 0.4 * _voiced(NASAL_HZ, CONSONANT_S, pitch_hz, throat)
    low, high, loudness = NOISES_HZ[name]
    count = round(RATE_HZ * CONSONANT_S * (0.4 if name == "t" else 1))  # a burst
    spectrum = np.fft.rfft(rng.normal(size=count))
    frequency = np.fft.rfftfreq(count, 1 / RATE_HZ)
    return loudness * np.fft.irfft(np.where((frequency >= low) & (frequency <= high), spectrum, 0), count)


def _voiced(formants: Sequence[Sequence[float]], seconds: float, pitch_hz: float, throat: float) -> NDArray:
    """Harmonics of the pitch, as loud as their distance to the gliding formants says; root mean square 0.5."""
    time = np.arange(round(RATE_HZ * seconds)) / RATE_HZ
    first, last = (throat * np.array(pair)[:, None] for pair in formants)
    tracks = first + (last - first) * time / seconds  # (2, N) Hz
    harmonics = pitch_hz * np.arange(1, int(0.95 * RATE_HZ / 2 / pitch_hz))
    loudness = (1 / (1 + ((harmonics[:, None, None] - tracks) / FORMANT_WIDTH_HZ) ** 2)).sum(axis=1)
    wave = (loudness * np.sin(2 * np.pi * harmonics[:, None] * time)).sum(axis=0)
    return 0.5 * wave / np.sqrt(np.mean(wave**2))

"""Files of one view as arrays: an image, a recording as its log-mel spectrogram, a table of vectors."""

import csv
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import signal
from scipy.io import wavfile

from mstkd.errors import UserError

BANDS, FRAMES = 32, 32  # of a spectrogram
WINDOW_S = 0.032  # of its short-time Fourier transform, longer if the frames would leave gaps
LOWEST_HZ = 50.0
FLOOR = 1e-4  # of the spectrogram's largest power, 40 dB below it: what is under it counts as silence


def read_image(path: Path) -> NDArray[np.float32]:
    """(rows, columns) grey values of an image file. Raises UserError if it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("F"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({' '.join(str(error).split())[:200]}); replace the file") from None


def read_spectrogram(path: Path, seconds: float) -> NDArray[np.float32]:
    """(BANDS, FRAMES): log power in mel bands of the first `seconds`, padded with silence, of a WAV file; channels are averaged.

    Raises UserError if it cannot be read, is empty or not finite.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks with texts
            rate_hz, samples = wavfile.read(path)
    except (OSError, ValueError, EOFError, ArithmeticError) as error:
        raise UserError(f"{path}: cannot be read as WAV ({' '.join(str(error).split())[:200]}); replace or convert the file") from None
    if not samples.size or not np.isfinite(samples).all():
        raise UserError(f"{path}: is empty or holds values that are not finite; replace the file")
    audio = samples.astype(np.float64).reshape(len(samples), -1).mean(axis=1)
    if samples.dtype == np.uint8:
        audio -= 128  # eight-bit WAV is unsigned
    wanted = round(seconds * rate_hz)
    if wanted < 2 * FRAMES:
        raise UserError(f"{path}: {rate_hz} samples per second for {seconds:g} s are too few for a spectrogram; raise --seconds")
    return log_mel(np.pad(audio[:wanted], (0, max(wanted - len(audio), 0))), rate_hz)


def log_mel(audio: NDArray[np.float64], rate_hz: int) -> NDArray[np.float32]:
    """(BANDS, FRAMES) of audio (N,), low bands first: natural logarithm of the power in triangular mel bands."""
    window = min(max(round(WINDOW_S * rate_hz), len(audio) // FRAMES + 1), len(audio) // 2)
    step = (len(audio) - window) // (FRAMES - 1)
    frequency_hz, _, power = signal.spectrogram(audio, rate_hz, "hann", nperseg=window, noverlap=window - step, detrend=False)
    bands = mel_bands(frequency_hz) @ power[:, :FRAMES]
    return np.log(np.maximum(bands, FLOOR * bands.max() + np.finfo(float).tiny)).astype(np.float32)


def mel_bands(frequency_hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """(BANDS, F): triangular weights over frequencies (F,), evenly spaced in mel, 2595 log10(1 + f / 700); each row sums to 1."""
    def mel(hertz: NDArray | float) -> NDArray:
        return 2595 * np.log10(1 + np.asarray(hertz) / 700)

    corners = np.linspace(mel(LOWEST_HZ), mel(frequency_hz[-1]), BANDS + 2)
    width = corners[1] - corners[0]
    weights = np.maximum(0, 1 - np.abs(mel(frequency_hz) - corners[1:-1, None]) / width)
    nearest = np.abs(mel(frequency_hz) - corners[1:-1, None]).argmin(axis=1)
    narrow = weights.sum(axis=1) == 0  # a band between two frequencies of the transform takes the nearer one
    weights[narrow, nearest[narrow]] = 1
    return weights / weights.sum(axis=1, keepdims=True)


def read_table(path: Path) -> dict[str, list[str]]:
    """Id -> the other columns of a CSV file whose first column is `id`; rows without gaps. Raises UserError."""
    rows: dict[str, list[str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            if len(header) < 2 or header[0] != "id":
                raise UserError(f"{path}: its first line must name the columns, the first of them id")
            for row in reader:
                if len(row) != len(header):
                    raise UserError(f"{path}:{reader.line_num}: {len(row)} columns, the first line has {len(header)}; correct the line")
                if row[0] in rows:
                    raise UserError(f"{path}:{reader.line_num}: id {row[0]!r} is there twice; keep one line")
                rows[row[0]] = row[1:]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV in UTF-8 ({error}); save it as such") from None
    return rows


def read_vectors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Id -> vector (n,), the numbers after the column `id` of a CSV file. Raises UserError."""
    vectors = {}
    for key, words in read_table(path).items():
        try:
            vectors[key] = np.array(words, dtype=np.float32)
        except ValueError as error:
            raise UserError(f"{path}: id {key!r}: {error}; every column but id holds a number") from None
    return vectors

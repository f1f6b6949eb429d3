"""The `nnunet` spec: a folder described by nnU-Net's dataset.json (version 1 or 2), or by the Medical Segmentation Decathlon's."""

import json
import logging
import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, Field

from mstkd.errors import UserError
from mstkd.recipe import validate_section
from mstkd.shards.dataset import DatasetSpec
from mstkd.shards.patterns import NIFTI, FilePattern

log = logging.getLogger(__name__)

PARTS = re.compile(r"(?:images|labels)(Tr|Ts|Val)")  # folders of one part of the data set
READABLE = (*NIFTI, ".mgz")


class DatasetJson(BaseModel):
    """What is used of nnU-Net's dataset.json; version 1 says `modality` where version 2 says `channel_names`."""

    channel_names: dict[str, str] | None = None
    modality: dict[str, str] | None = None
    labels: dict[str, Any] = Field(min_length=1)  # version 1: value -> name; version 2: name -> value or values of a region
    regions_class_order: list[int] | None = None
    file_ending: str = ".nii.gz"
    numTraining: int | None = None  # noqa: N815, as the file has it
    training: list[Any] | None = None  # version 1 lists its cases
    dataset: dict[str, Any] | None = None
    licence: str = ""
    license: str = ""


def nnunet_spec(src: Path) -> DatasetSpec:
    """The spec of the nnU-Net folder `src`: one with dataset.json, or its imagesTr, imagesTs or a labels folder.

    Channel and region names become keys (letters, digits, _); what changed is logged and in `description`. Region-based
    labels keep nnU-Net's order of painting. Raises UserError: no or a broken dataset.json, something in it that cannot
    be represented, or cases on disk that are not those it lists.
    """
    src = Path(src)
    path, part = _locate(src)
    found = _read(path)
    channels = _channels(found, path)
    folder = re.sub(r"[^A-Za-z0-9_-]+", "_", path.parent.name) or "nnunet"
    images = _relative(path.parent / f"images{part}", src) if part else ""
    spec: dict[str, Any] = {
        "name": folder,
        "licence": found.licence or found.license,
        "layout": "flat",
        "sequences": dict(zip(channels.values(), _image_patterns(found, list(channels), src, images))),
        "labels": "none",
    }
    renamed = [(f"channel {number} {old!r}", new) for (number, old), new in channels.items() if old != new]
    if part:
        scheme, regions = _scheme(found, folder, path)
        renamed += regions
        label = _relative(path.parent / f"labels{part}", src) + f"{{subject}}{found.file_ending}"
        spec |= {"labels": "required" if part == "Tr" else "optional", "label": label, "label_scheme": scheme}
    said = "; ".join(f"{old} is called {new}" for old, new in renamed)
    if said:
        log.warning("%s: %s", path, said)
    spec["description"] = f"nnU-Net folder {path.parent.name}" + (f"; {said}" if said else "")
    dataset = validate_section(DatasetSpec, spec, "", str(path))
    if part == "Tr":
        _check_listing(found, dataset, src, path)
    return dataset


def _locate(src: Path) -> tuple[Path, str]:
    """dataset.json, and the part of the data set that `src` is about ("" for a folder of images beside a dataset.json)."""
    if not src.is_dir():
        raise UserError(f"{src}: no such folder; give the nnU-Net folder DatasetXXX_Name")
    whole = Path(os.path.abspath(src))  # the parent of "." is asked for
    if (whole / "dataset.json").is_file():
        return whole / "dataset.json", "Tr" if (whole / "imagesTr").is_dir() else ""
    if (match := PARTS.fullmatch(whole.name)) and (whole.parent / "dataset.json").is_file():
        return whole.parent / "dataset.json", match[1]
    raise UserError(
        f"{src}: no dataset.json here; spec nnunet reads a folder DatasetXXX_Name, its imagesTs, or images beside a copy of dataset.json"
    )


def _read(path: Path) -> DatasetJson:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {str(error) or 'too deeply nested'}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with channel_names and labels")
    found = validate_section(DatasetJson, values, "", str(path))
    if found.dataset:
        raise UserError(f"{path}: `dataset` lists files one by one, which spec nnunet does not read; copy them into imagesTr and labelsTr")
    if found.file_ending not in READABLE:
        raise UserError(f"{path}: file_ending {found.file_ending!r} cannot be read; convert the images to .nii.gz")
    return found


def _channels(found: DatasetJson, path: Path) -> dict[tuple[int, str], str]:
    """(number, name in dataset.json) -> sequence name, in channel order."""
    names = found.channel_names or found.modality
    if not names:
        raise UserError(f"{path}: neither channel_names nor modality; say which channel is what")
    if wrong := [key for key in names if not key.isdecimal()]:
        raise UserError(f"{path}: channel {wrong[0]!r} is no number; number the channels from 0")
    numbered = sorted((int(key), name) for key, name in names.items())
    keys = _keys([name for _, name in numbered], [str(number) for number, _ in numbered], "channel")
    return dict(zip(numbered, keys))


def _keys(names: list[str], numbers: list[str], kind: str) -> list[str]:
    """Names made of letters, digits and _; those that would be the same carry their number."""
    keys = [re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or kind for name in names]
    count = Counter(keys)
    return [key if count[key] == 1 and key != kind else f"{key}_{number}" for key, number in zip(keys, numbers)]


def _relative(folder: Path, src: Path) -> str:
    """`folder` as the beginning of a file pattern that counts from `src`."""
    below = os.path.relpath(folder, src).replace(os.sep, "/")
    return "" if below == "." else below + "/"


def _image_patterns(found: DatasetJson, channels: list[tuple[int, str]], src: Path, images: str) -> list[str]:
    """One file per channel, CASE_0000 and so on; or, in the Decathlon's folders, one file with all of them."""
    files = [f"{images}{{subject}}_{number:04d}{found.file_ending}" for number, _ in channels]
    whole = f"{images}{{subject}}{found.file_ending}"
    if found.modality and not FilePattern.parse(files[0]).subjects(src) and FilePattern.parse(whole).subjects(src):
        return [whole] if len(channels) == 1 else [f"{whole}#{number}" for number, _ in channels]
    return files


def _scheme(found: DatasetJson, name: str, path: Path) -> tuple[dict, list[tuple[str, str]]]:
    """The label scheme as a spec writes it, and the names that changed, before and after."""
    declared = found.labels
    if all(key.isdecimal() and isinstance(value, str) for key, value in declared.items()):  # version 1
        declared = {value: int(key) for key, value in declared.items()}
    if len(declared) < len(found.labels):
        raise UserError(f"{path}: labels: two values have one name; give each its own")
    if "ignore" in declared:
        raise UserError(f"{path}: labels: 'ignore' (not trained on) has no counterpart; label those voxels, or leave these cases out")
    values = {label: value if isinstance(value, list) else [value] for label, value in declared.items()}
    if wrong := [label for label, numbers in values.items() if not numbers or not all(type(number) is int for number in numbers)]:
        raise UserError(f"{path}: labels: {wrong[0]!r} is neither a value nor a list of values")
    foreground = {label: numbers for label, numbers in values.items() if numbers != [0]}
    order = found.regions_class_order
    if order is None and any(len(numbers) > 1 for numbers in foreground.values()):
        raise UserError(f"{path}: labels are regions, but regions_class_order is missing; add it as nnU-Net asks")
    paint = order if order is not None else [numbers[0] for numbers in foreground.values()]
    if len(paint) != len(foreground):
        raise UserError(f"{path}: regions_class_order has {len(paint)} values for {len(foreground)} regions; give one for each")
    keys = _keys(list(foreground), [str(number) for number in range(1, len(foreground) + 1)], "label")
    scheme = {
        "name": name,
        "values": sorted({0, *paint, *(number for numbers in foreground.values() for number in numbers)}),
        "regions": dict(zip(keys, foreground.values())),
        "paint": dict(zip(keys, paint)),
    }
    return scheme, [(f"label {label!r}", key) for label, key in zip(foreground, keys) if label != key]


def _check_listing(found: DatasetJson, dataset: DatasetSpec, src: Path, path: Path) -> None:
    """UserError unless the cases in imagesTr are those that dataset.json lists (version 1) or as many (version 2)."""
    on_disk = set().union(*(pattern.subjects(src) for pattern in dataset.patterns()[: len(dataset.sequences)]))
    if not on_disk:
        return  # find_cases says what it expects
    if found.training is not None:
        listed = {_listed_case(item, number, found, path) for number, item in enumerate(found.training)}
        if missing := sorted(listed - on_disk):
            raise UserError(f"{path}: lists case {missing[0]}, which imagesTr lacks ({len(missing)} in all); copy it or take it off the list")
        if extra := sorted(on_disk - listed):
            raise UserError(f"{path}: does not list case {extra[0]} of imagesTr ({len(extra)} in all); list it or move it away")
    elif found.numTraining is not None and found.numTraining != len(on_disk):
        raise UserError(f"{path}: numTraining is {found.numTraining}, but imagesTr holds {len(on_disk)} cases; complete or correct it")


def _listed_case(item: Any, number: int, found: DatasetJson, path: Path) -> str:
    image = item.get("image") if isinstance(item, dict) else None
    if not isinstance(image, str):
        raise UserError(f"{path}: training.{number}: expected an object with image and label, two paths")
    return PurePosixPath(image).name.removesuffix(found.file_ending)

"""From a case's NIfTI files to its label map, as the facts in configs/mstkd.json say.

This file travels with the bundle and does without mstkd: NumPy, SciPy, NiBabel, PyTorch and MONAI will do.
"""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.inferers import sliding_window_inference
from scipy.ndimage import binary_fill_holes

EPSILON = 1e-6  # probabilities stay so far from 0 and 1 when they become logits again


def predict_folder(network, bundle_root, dataset_dir, output_dir, device):
    """Write <output_dir>/<case>.nii.gz for every <dataset_dir>/<case>/ with files <sequence>.nii.gz, any subset of the sequences."""
    facts = json.loads((Path(bundle_root) / "configs" / "mstkd.json").read_text())
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    for folder in sorted(path for path in Path(dataset_dir).iterdir() if path.is_dir()):
        files = {name: folder / f"{name}.nii.gz" for name in facts["sequences"] if (folder / f"{name}.nii.gz").is_file()}
        if not files:
            raise ValueError(f"{folder}: no image; name its files {', '.join(facts['sequences'])}, each .nii.gz")
        images = {name: nib.load(file) for name, file in files.items()}
        first = next(iter(images.values()))
        labels = predict_case(network.to(device).eval(), facts, images, device)
        nib.save(nib.Nifti1Image(labels, first.affine), Path(output_dir) / f"{folder.name}.nii.gz")


def predict_case(network, facts, images, device="cpu"):
    """The label map (uint8, in the axes of the first file) of images: sequence name -> NIfTI image, skull-stripped with background 0, on one grid."""
    first = next(iter(images.values()))
    volumes = {name: np.asanyarray(nib.as_closest_canonical(image).dataobj).astype(np.float32) for name, image in images.items()}
    if other := [n for n, image in images.items() if image.shape != first.shape or not np.allclose(image.affine, first.affine, rtol=0, atol=1e-3)]:
        raise ValueError(f"{other[0]}: lies on another grid than {next(iter(images))}; resample them to one")
    brain = binary_fill_holes(np.logical_or.reduce([volume != 0 for volume in volumes.values()]))
    if not brain.any():
        raise ValueError("every image is 0 throughout")
    box = _box(brain, facts["files"]["preprocessing"]["margin_voxels"])
    inside = brain[box]
    given = _given(facts, volumes)
    image = np.full((len(facts["sequences"]), *np.maximum(inside.shape, _window(facts))), facts["hidden_value"], np.float32)
    pads = [((long - short) // 2, long - short - (long - short) // 2) for long, short in zip(image.shape[1:], inside.shape)]
    for channel, name in enumerate(facts["sequences"]):
        if name in given:
            image[channel] = _normalised(volumes[name][box], inside, pads, facts["intensity"])
    available = torch.tensor([[name in given for name in facts["sequences"]]], device=device)
    logits = _logits(network, torch.from_numpy(image)[None].to(device), available, facts)
    inner = tuple(slice(before, before + size) for (before, _), size in zip(pads, inside.shape))
    whole = np.zeros(brain.shape, np.uint8)
    whole[box] = network.labels(logits[..., inner[0], inner[1], inner[2]])[0].numpy()
    there = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.io_orientation(first.affine))
    return np.ascontiguousarray(nib.orientations.apply_orientation(whole, there))


def _given(facts, volumes):
    """The sequences that the network is shown: all that there are, or the largest subset that it takes."""
    if facts["subsets"] is None:
        return set(volumes)
    fitting = [set(name.split("+")) for name in facts["subsets"] if set(name.split("+")) <= set(volumes)]
    if not fitting:
        raise ValueError(f"the case has {'+'.join(volumes)}; the network needs one of {', '.join(facts['subsets'])}")
    return max(fitting, key=len)


def _window(facts):
    return tuple(facts["inference"]["window"] or facts["crop"])


def _box(brain, margin):
    spans = []
    for axis in range(3):
        places = np.flatnonzero(brain.any(tuple({0, 1, 2} - {axis})))
        spans.append(slice(max(places[0] - margin, 0), min(places[-1] + 1 + margin, brain.shape[axis])))
    return tuple(spans)


def _normalised(raw, inside, pads, intensity):
    """The method's intensities of one volume over the brain box, padded; mean and deviation as float16 z-scores keep them."""
    voxels = raw[inside].astype(np.float64)
    mean, std, kind = voxels.mean(), voxels.std(), intensity["kind"]
    if std == 0:
        raise ValueError("an image has one value in the whole brain; leave it out")
    z = np.zeros(raw.shape, np.float16)
    z[inside] = ((raw[inside] - np.float32(mean)) / np.float32(std)).astype(np.float16)
    z, inside = np.pad(z, pads).astype(np.float32), np.pad(inside, pads)
    if kind == "zscore":
        return z
    low, high = voxels.min(), voxels.max()
    if kind == "percentile":
        share = 0.1 if intensity["percentile"] == "0.1" else 0.5
        low, high = np.percentile(voxels, [share, 100 - share])
    elif kind == "reference_minmax":
        low, high = min(low, 0.0), max(high, 0.0)
    floor, ceiling = intensity["interval"]
    if high <= low:  # all but the rarest voxels have one value: everything is the minimum
        return np.full(z.shape, floor, np.float32)
    per_raw = (ceiling - floor) / (high - low)
    background = floor - low * per_raw if kind == "reference_minmax" else floor
    scaled = z * np.float32(std * per_raw) + np.float32((mean - low) * per_raw + floor)
    return np.where(inside, np.clip(scaled, floor, ceiling), np.float32(background))


@torch.no_grad()
def _logits(network, image, available, facts):
    inference = facts["inference"]
    probable = inference["average"] == "probabilities"

    def scores(patch):
        logits = network(patch, available.expand(len(patch), -1))
        return logits.sigmoid() if probable else logits

    mode = {"gaussian": "gaussian", "uniform": "constant"}[inference["blend"]]
    blended = sliding_window_inference(image, _window(facts), inference["batch"], scores, overlap=inference["overlap"], mode=mode)
    return blended.logit(eps=EPSILON) if probable else blended

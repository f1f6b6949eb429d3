"""A method that predicts tumours without having been trained, for measurements that need label maps like real ones."""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mstkd.evaluate.inference import Predictor
from mstkd.evaluate.metrics import region_masks
from mstkd.evaluate.source import CaseSource
from mstkd.methods import DataFacts, read_config
from mstkd.methods.mst_kdnet import MSTKDNet
from mstkd.subsets import Subset, all_subsets

REACH = 5  # voxels per axis that are averaged before a voxel is judged


class Fitted(MSTKDNet):
    """An untrained MST-KDNet is run, so that predictions cost what they cost; tumours come from a linear read-out of what it is shown.

    The read-out is fitted to a few cases, for every subset by itself: label maps differ by subset and are wrong where a voxel's own
    intensities mislead.
    """

    def __init__(self, section: dict, facts: DataFacts):
        """`section`: a recipe's `method:` section of MST-KDNet."""
        torch.manual_seed(0)
        super().__init__(read_config(section), facts)
        self.weights: dict[Subset, Tensor] = {}  # (3, M + 1)

    def fit(self, predictor: Predictor, source: CaseSource, subjects: Iterable[str]) -> None:
        """Least squares over the brains' voxels; as many of them are called a region as belong to it."""
        seen, wanted = [], []
        for key in subjects:
            sample = source.subject(key)
            volume, inside = predictor.volume(sample.image, sample.brain, sample.meta), torch.from_numpy(sample.brain > 0)
            seen.append(_smooth(volume.image)[0, :, *volume.inner].cpu()[:, inside])
            wanted.append(torch.stack([torch.from_numpy(mask)[inside] for mask in region_masks(sample.label, source.label_scheme).values()]))
        features, truth = torch.cat(seen, 1), torch.cat(wanted, 1).float()
        for subset in all_subsets(source.sequences):
            shown = torch.cat([features * torch.tensor(subset)[:, None], torch.ones_like(features[:1])])
            weights = truth @ shown.T @ torch.linalg.pinv(shown @ shown.T)
            for row, score, share in zip(weights, weights @ shown, truth.mean(1), strict=True):
                row[-1] -= np.quantile(score.numpy(), 1 - share.item())
            self.weights[subset] = weights

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        logits = super().predict(image, available, network)
        weights = self.weights[tuple(available[0].tolist())].to(image)
        judged = torch.einsum("km,bmxyz->bkxyz", weights[:, :-1], _smooth(image)) + weights[:, -1, None, None, None]
        return torch.cat([judged, logits[:, 3:]], 1)


def _smooth(image: Tensor) -> Tensor:
    return F.avg_pool3d(image, REACH, 1, REACH // 2, count_include_pad=False)

"""What toys have in common whose networks answer with regions: a network of its own by each name, and labels painted region by region."""

import torch

from mstkd.config import IntensityConfig
from mstkd.methods import Method


class Painting(Method):
    task = "segmentation"
    intensity = IntensityConfig()
    threshold = 0.5  # of an answer, above which a voxel is of the region

    def predict(self, image, available, network="student"):
        return self.networks[network](image)

    def to_labels(self, logits):
        scheme = self.facts.label_scheme
        labels = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.uint8, device=logits.device)
        for k, region in enumerate(scheme.regions):
            labels[logits[:, k] > self.threshold] = scheme.paint[region]
        return labels

"""ShaSpec for classification: shared and specific features of whatever views there are, e.g. image and audio.

Wang et al., CVPR 2023, arXiv:2307.14126. One network learns the classes from any non-empty subset of views: a missing
view's feature is the mean of the available shared ones. Two small losses beside the cross-entropy: shared features of
a sample shall be alike (DAO, L1), specific ones shall tell their view (DCO).

Where this differs from the paper: a stem per view stands before the shared encoder, because views differ in shape;
DAO and DCO count available views alone (the released code also those that are missing); the head's first layer is
followed by a ReLU, without which two layers were one.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mstkd.batch import Progress, StepOutput, ViewBatch
from mstkd.config import IntensityConfig, OptimizerConfig, ScheduleConfig, Section
from mstkd.errors import UserError
from mstkd.losses.domain import alignment, classification
from mstkd.methods import DataFacts, Method, Role, RoleStep
from mstkd.methods.shaspec import DomainWeights
from mstkd.models.shaspec_views import SharedSpecificClassifier


class ShaSpecClassifyConfig(Section):
    width: int = Field(128, ge=1)  # features of a view
    hidden: int = Field(128, ge=1)  # of the head's first layer
    dropout: float = Field(0.5, ge=0, lt=1)  # between the head's layers
    weights: DomainWeights = DomainWeights()


class ClassifyStep(RoleStep):
    """The classes, from the views that the sample may show."""

    def __init__(self, network: nn.Module, weights: DomainWeights):
        super().__init__()
        self.network, self.weights = network, weights

    def forward(self, batch: ViewBatch, carry: dict[str, Tensor], progress: Progress) -> StepOutput:
        logits, shared, domains = self.network(batch.visible(), batch.available)
        task = F.cross_entropy(logits.float(), batch.label)
        pairs, views = batch.available.nonzero().tolist(), batch.available.shape[1]
        dao = alignment(shared[batch.available].float(), pairs, views)
        dco = classification(domains[batch.available].float(), pairs)
        right = (logits.argmax(1) == batch.label).float().mean()
        scalars = {"cross_entropy": task.detach(), "dao": dao.detach(), "dco": dco.detach(), "accuracy": right}
        return StepOutput(task + self.weights.dao * dao + self.weights.dco * dco, scalars)


class ShaSpecClassify(Method):
    Config = ShaSpecClassifyConfig
    task = "classification"
    stages = ("train",)
    complete_only = False
    paper = "Wang et al., CVPR 2023"
    reproduces = "losses, fusion, head and schedule of the classification form; encoders of our own"

    def __init__(self, config: ShaSpecClassifyConfig, facts: DataFacts):
        self.config, views, classes = config, facts.classification.views, facts.classification.classes
        try:
            network = SharedSpecificClassifier(views, len(classes), config.width, config.hidden, config.dropout)
        except ValueError as error:
            raise UserError(f"data.shards: {error}; build the set with images as (H, W) or (C, H, W) and vectors as (n,)") from None
        self.networks: dict[str, nn.Module] = {"student": network}

    @property
    def intensity(self) -> IntensityConfig:
        return IntensityConfig()  # views are stored z-scored; what is hidden is 0

    def roles(self, stage: str) -> dict[str, Role]:
        step = ClassifyStep(self.networks["student"], self.config.weights)
        optimizer = OptimizerConfig(name="adam", lr=1e-3, weight_decay=1e-2)
        return {"student": Role(step, ("student",), optimizer=optimizer, schedule=ScheduleConfig(name="step", gamma=0.9, every_epochs=20))}

    def predict(self, image: dict[str, Tensor], available: Tensor, network: str = "student") -> Tensor:
        return self.networks[network](image, available)[0]

    def to_labels(self, logits: Tensor) -> Tensor:
        return logits.argmax(1)


METHOD = ShaSpecClassify

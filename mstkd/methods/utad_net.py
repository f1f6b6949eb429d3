"""UTAD-Net: translation of axial slices between sequences, learnt unpaired; a teacher that is told where the tumour is, a student that is not.

Source: Huang et al., arXiv:2403.20168, and its released code. Every subject shows one sequence, drawn once for the whole run; the labels
of the training subjects give masks to the teacher's input and to the losses of both stages. The student translates without one.
Where this differs from the paper or the released code, and why:
- both critics are one role: one Adam over disjoint weights is the same as two (only `gradient_clipping`, off by default, would join them);
- `preset: code` (default) weights the gradient penalty by 10, `paper` by 1; there is no other difference between the two;
- the penalty is on the sum of a critic's patch scores, as released, though the adversarial term is their mean: `gp_patch`;
- targets are the other sequences, equally likely; the released code permutes the batch's own, a quarter of them identities: `target_sampling`;
- the fusion has instance norms; with the released batch norms teacher and student of equal weights differ: `network.fusion_norm`;
- the frozen teacher is in evaluation mode and without gradient (there its gradients were computed, and kept for ever);
- the learning rate of the last epoch is the published 1e-6 (there 2.98e-6);
- intensities are cut at the 0.1 and 99.9 percentiles: 99.5 flattens a quarter of the tumour in some FLAIR (`intensity: {percentile: "0.5"}`).
The paper names its structures (`student_arch`) and mask ablations (`mask`) without describing them: what they are here stands beside the
keys. Of the paper's baselines `stargan` and `resvit` are provided, as far as their files say; DRIT++, TarGAN and ReMIC are not.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mstkd.errors import UserError
from mstkd.methods import DataFacts, Role
from mstkd.methods._translation import (
    Masks, NetworkConfig, SliceTranslation, Task, TranslationConfig, TranslationWeights, build_critics, check_size, observed, others,
)  # fmt: skip
from mstkd.models.utad_net import Double, Fusion, Generator, Up
from mstkd.shards.spec import LabelScheme

PENALTY = {"code": 10.0, "paper": 1.0}  # weight of the gradient penalty


class UTADWeights(TranslationWeights):
    local: float = Field(10.0, ge=0)
    feature: float = Field(10.0, ge=0)  # of the distillation, as is
    image: float = Field(10.0, ge=0)


class UTADNetworkConfig(NetworkConfig):
    fusion_norm: Literal["instance", "batch"] = "instance"


class UTADNetConfig(TranslationConfig):
    preset: Literal["code", "paper"] = "code"  # a key that is given wins over it
    network: UTADNetworkConfig = UTADNetworkConfig()
    weights: UTADWeights = UTADWeights()
    region: Literal["WT", "TC", "ET"] = "WT"  # what the masks show
    mask: Literal["region", "zeros", "random"] = "region"  # ablation, in training and for the teacher: no tumour, or each pixel by a coin
    student_arch: Literal["full", "global", "no_local_encoder", "no_local_decoder"] = "full"
    """Without the local encoder the global one stands in for it; without the local decoder the tumour image is cut from the
    generated slice. global: without both and without fusion; its deepest map is then the distilled feature."""
    student_init: Literal["teacher", "random"] = "teacher"  # teacher: all but the local encoder

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        weights, penalty = values.get("weights", {}), PENALTY.get(str(values.get("preset", "code")))
        if penalty is None or not isinstance(weights, dict):
            return values  # refused by the fields themselves
        return {**values, "weights": {"gradient_penalty": penalty, **weights}}


class UTADNet(SliceTranslation):
    Config = UTADNetConfig
    stages = ("teacher", "student")
    oracles = ("teacher",)
    offers_fused = True
    blocks = (Double, Up, Fusion)
    paper = "Huang et al., arXiv:2403.20168"
    reproduces = "networks, losses and training; paper and code by presets; no table yet"

    def __init__(self, config: UTADNetConfig, facts: DataFacts):
        check_size(facts, 2**config.network.levels, f"method.network.levels {config.network.levels}")
        self.config, self.facts = config, facts
        self.oracles = ("teacher",) if config.mask == "region" else ()  # the ablations' masks tell it nothing
        self.masks = Masks(config.mask, region_values(facts.label_scheme, config.region) if config.mask == "region" else ())
        arches = {"student": config.student_arch, "teacher": "full"}
        self.networks: dict[str, nn.Module] = {
            name: Generator(len(facts.sequences), **config.network.model_dump(), branches=arch) for name, arch in arches.items()
        }
        self.networks["critics"] = build_critics(config, facts, ("whole", "tumour"))

    def roles(self, stage: str) -> dict[str, Role]:
        return self.roles_of(stage, self._task(stage), self.networks["teacher"] if stage == "student" else None)

    def needs(self, stage: str) -> dict[str, str]:
        return {"teacher": "teacher"} if stage == "student" else {}

    def begin(self, stage: str) -> None:
        """The student takes the teacher's weights and keeps the fresh ones of its local encoder, which sees something else."""
        if stage == "student" and self.config.student_init == "teacher":
            student, teacher = (self.networks[name].state_dict() for name in ("student", "teacher"))
            for key, value in student.items():
                if not key.startswith("local_encoder."):
                    value.copy_(teacher[key])

    def predict(self, image: Tensor, available: Tensor, network: str = "student") -> Tensor:
        if network == "teacher" and network not in self.oracles:
            return self.predict_oracle(image, available, torch.zeros_like(image[:, 0], dtype=torch.uint8), network)
        return super().predict(image, available, network)

    def predict_oracle(self, image: Tensor, available: Tensor, label: Tensor, network: str) -> Tensor:
        return self.completed(image, available, network, self._task(network), self._mask(label))

    @torch.no_grad()
    def fused(self, image: Tensor, available: Tensor, label: Tensor, network: str) -> Tensor:
        """(B, M - 1, C, s, s) float32: the fused features on the way to each other sequence, in the same order for both networks.

        For the error of the student's against the teacher's (Table III); image and available as in `predict`, the teacher's masks from `label`.
        """
        given, source = observed(image, available)
        task, mask = self._task(network), self._mask(label)
        features = [task.translate(self.networks[network], given, target, mask).fused for target in others(source, task.sequences)]
        return torch.stack(features, 1).float()

    def _task(self, network: str) -> Task:
        return Task(len(self.facts.sequences), self.masks, guided=network == "teacher")

    def _mask(self, label: Tensor) -> Tensor:
        return self.masks(label, torch.Generator().manual_seed(0))  # the same in every call: a prediction can be repeated


def region_values(scheme: LabelScheme | None, region: str) -> tuple[int, ...]:
    if scheme is None or region not in scheme.regions:
        raise UserError(f"method.region: {region} is no region of {scheme.name if scheme else 'a set without labels'}; it needs one with masks of tumours, e.g. brats2018")
    return scheme.regions[region]


METHOD = UTADNet

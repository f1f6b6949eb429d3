"""Mean teacher: the teacher is the student's moving average (arXiv:1703.01780); it sees all sequences, the student a subset.

One network, trained once: what the student knows with every sequence is what it should know without. The teacher is
never trained by gradient, so nothing has to be trained before. Losses and networks are those of `kd`.
"""

from pydantic import Field
from torch import nn

from mstkd.batch import Progress
from mstkd.config import OptimizerConfig, ScheduleConfig
from mstkd.losses.distillation import ramp_up
from mstkd.methods import DataFacts, Role
from mstkd.methods._tumours import TumourSegmentation
from mstkd.methods.kd import DistillConfig, DistillStep, NetworkConfig, WeightConfig, build_network, check_divisible
from mstkd.targets import TumourChannels


class MeanTeacherWeights(WeightConfig):
    feature: float = Field(0.0, ge=0)


class MeanTeacherConfig(DistillConfig):
    network: NetworkConfig = NetworkConfig()
    weights: MeanTeacherWeights = MeanTeacherWeights()
    decay: float = Field(0.999, ge=0, lt=1)  # of the average, per update
    ramp_epochs: int = Field(20, ge=1)  # until the teacher's terms have their full weight: at first it knows nothing


class MeanTeacherStep(DistillStep):
    def transfer_share(self, progress: Progress) -> float:
        return ramp_up(progress.epoch, self.config.ramp_epochs)


class MeanTeacher(TumourSegmentation):
    Config = MeanTeacherConfig
    stages = ("distill",)
    paper = "Tarvainen & Valpola, NeurIPS 2017"
    reproduces = "the averaged teacher, without unlabelled data; no table"

    def __init__(self, config: MeanTeacherConfig, facts: DataFacts):
        self.config = config
        self.channels = TumourChannels(facts.label_scheme, config.targets, config.rc_channel)
        names = ("student", "teacher")
        self.networks: dict[str, nn.Module] = {name: build_network("network", config.network, facts, self.channels.count) for name in names}

    @classmethod
    def check_crop(cls, config: MeanTeacherConfig, crop: tuple[int, int, int], key: str = "data.crop") -> None:
        check_divisible("network", config.network, crop, key)

    def roles(self, stage: str) -> dict[str, Role]:
        step = MeanTeacherStep(self.networks["student"], None, self.networks["teacher"], self.channels, self.config)
        return {
            "student": Role(
                step,
                networks=("student",),
                averages={"teacher": "student"},
                decay=self.config.decay,
                optimizer=OptimizerConfig(name="adamw", lr=3e-4, weight_decay=1e-5),
                schedule=ScheduleConfig(name="poly"),
            )
        }


METHOD = MeanTeacher

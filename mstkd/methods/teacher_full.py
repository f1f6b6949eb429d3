"""MST-KDNet's network trained on complete input only: what is there to be reached with every sequence.

All else is as in `student_only`. Evaluation also scores incomplete input, with the hidden sequences filled, and says that
this was never trained: those figures show what happens to a network that nobody prepared for it.
"""

from pydantic import Field

from mstkd.config import AvailabilityConfig, Section
from mstkd.methods.mst_kdnet import TrunkConfig
from mstkd.methods.student_only import StudentOnly


class TeacherWeights(Section):
    """As in mst_kdnet, and by the same names."""

    dice_teacher: float = Field(0.4, ge=0)
    bce: float = Field(0.0, ge=0)


class TeacherFullConfig(TrunkConfig):
    weights: TeacherWeights = TeacherWeights()


class TeacherFull(StudentOnly):
    Config = TeacherFullConfig
    scored = sees_all = ("teacher",)
    paper = "none: the teacher of mst_kdnet"
    reproduces = "mst_kdnet without its student, all else equal"

    def availability(self, stage: str) -> AvailabilityConfig:
        return AvailabilityConfig(kind="natural")


METHOD = TeacherFull

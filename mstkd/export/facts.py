"""What is written beside exported weights: all that is needed to use them, and no host, path or person."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mstkd import __version__
from mstkd.config import InferenceConfig, IntensityConfig
from mstkd.errors import UserError
from mstkd.methods import resolve
from mstkd.shards.dataset import DatasetSpec, PreprocessConfig
from mstkd.shards.spec import LabelScheme, Strict
from mstkd.trained_run import TrainedRun

FACTS = "mstkd.json"


class FileFacts(Strict):
    """How files become what the networks were trained on; each is described in `DatasetSpec`."""

    layout: Literal["folders", "flat"]
    sequences: dict[str, str]
    allow_missing: bool
    brain_mask: str | None
    preprocessing: PreprocessConfig


class StudentFacts(Strict):
    """`mstkd.json`."""

    format: Literal[1] = 1
    mstkd: str  # version
    network: str  # what the run is for, usually the student
    companions: tuple[str, ...] = ()  # that it cannot do without
    method: dict[str, Any]  # the recipe's section, every default written out
    dataset: str
    files: FileFacts
    sequences: tuple[str, ...]  # in channel order
    subsets: tuple[str, ...] | None  # of them that the network takes, by name; None: all
    label_scheme: LabelScheme
    intensity: IntensityConfig
    hidden_value: float  # what a hidden sequence holds
    crop: tuple[int, int, int]  # voxels, of training
    inference: InferenceConfig

    @property
    def window(self) -> tuple[int, int, int]:
        """(X, Y, Z) voxels that the network is given at once."""
        return self.inference.window or self.crop

    @property
    def weights(self) -> dict[str, str]:
        """File by network."""
        return {name: f"{name}.safetensors" for name in (self.network, *self.companions)}

    @property
    def spec(self) -> DatasetSpec:
        """The data set, as far as it takes to read a case of it."""
        return DatasetSpec(name=self.dataset, description="", labels="none", **dict(self.files))


def facts_of(run: TrainedRun, dataset: DatasetSpec) -> StudentFacts:
    """Those of a segmentation run, whose cases are prepared as `dataset` says."""
    name, config, method = run.networks[0], run.config, run.method
    return StudentFacts(
        mstkd=__version__,
        network=name,
        companions=method.companions.get(name, ()),
        method=resolve(config.method),
        dataset=dataset.name,
        files=FileFacts(**{key: getattr(dataset, key) for key in FileFacts.model_fields}),
        sequences=run.facts.sequences,
        subsets=method.subsets,
        label_scheme=run.facts.label_scheme,
        intensity=IntensityConfig.model_validate(method.intensity.model_dump()),
        hidden_value=method.intensity.hidden_value,
        crop=config.data.crop,
        inference=config.inference,
    )


def write_facts(facts: StudentFacts, folder: Path) -> None:
    (folder / FACTS).write_text(facts.model_dump_json(indent=1) + "\n")


def read_facts(folder: Path) -> StudentFacts:
    """Those in an exported folder. Raises UserError where another version wrote them."""
    path = folder / FACTS
    try:
        return StudentFacts.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise UserError(f"{path}: {where}: {problem['msg']}; written by another version than mstkd {__version__}? Export the run again") from None

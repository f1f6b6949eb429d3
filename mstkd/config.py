"""The recipe: typed sections, and how a file, dotted overrides and defaults become one resolved configuration.

Everything but `method:` is checked here, without loading torch; `method:` is checked against the method's own
model once its file is imported (`mstkd.methods.build`).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from mstkd.errors import UserError
from mstkd.recipe import find_recipe, read_json, read_with_overrides, validate_section


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class IntensityConfig(Section):
    """Affine map and clip applied per sequence, from the statistics stored with each subject."""

    kind: Literal["zscore", "minmax", "percentile", "reference_minmax", "clahe"] = "zscore"
    """zscore: over the brain, background 0. minmax: brain minimum and maximum to `interval`. percentile: the
    `percentile` tails are clipped. reference_minmax: as minmax over the whole array, background included. clahe: percentile
    0.5 to [0, 1], then contrast-limited adaptive histogram equalisation, which the shard set must hold."""
    percentile: Literal["0.1", "0.5"] = "0.5"
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def hidden_value(self) -> float:
        """What a hidden or absent sequence is filled with: 0 for z-scores, else the lower end of the interval."""
        return 0.0 if self.kind == "zscore" else self.interval[0]


class OptimizerConfig(Section):
    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)  # adam: L2 added to the gradient; adamw: decoupled
    momentum: float = Field(0.0, ge=0, lt=1)  # sgd only
    nesterov: bool = False  # sgd only


class ScheduleConfig(Section):
    """Learning rate as a function of the step (or of the epoch's first step)."""

    name: Literal["constant", "poly", "cosine", "step", "linear"] = "constant"
    per: Literal["step", "epoch"] = "step"  # poly, cosine and linear
    power: float = Field(0.9, gt=0)  # poly only
    warmup_steps: int = Field(0, ge=0)  # linear from 0 (excluded) to lr
    min_lr_ratio: float = Field(0.0, ge=0, le=1)  # cosine and linear: final lr / lr
    constant_share: float = Field(0.0, ge=0, lt=1)  # linear only: share of the training before it falls
    gamma: float = Field(0.9, gt=0, le=1)  # step only: the factor on lr, once every so many epochs
    every_epochs: int = Field(20, ge=1)
    after_steps: int = Field(0, ge=0)  # per step: the curve runs over so many steps more and begins after them (a warm restart)


class AugmentConfig(Section):
    """Seeded by (seed, item). Geometry acts on image, brain and label alike; intensity acts on brain voxels."""

    flip_prob: float = Field(0.5, ge=0, le=1)  # per axis of `flip_axes`
    flip_axes: str = Field("xyz", pattern="^x?y?z?$")  # x: left and right alone
    quarter_turn_prob: float = Field(0.0, ge=0, le=1)  # of an exact turn by 90, 180 or 270 degrees about Z, in voxels; padded and cropped to the crop
    rotate_deg: float = Field(0.0, ge=0, le=180)  # uniform in +-rotate_deg about each axis
    zoom: float = Field(0.0, ge=0, lt=1)  # isotropic, uniform in 1 +- zoom
    zoom_prob: float = Field(1.0, ge=0, le=1)
    intensity_scale: float = Field(0.0, ge=0, lt=1)  # x (1 + U(-s, s)), per sequence
    intensity_shift: float = Field(0.0, ge=0)  # + U(-s, s), normalised units, per sequence
    noise_std: float = Field(0.0, ge=0)  # Gaussian, normalised units


class ShardSetConfig(Section):
    path: str
    repeat: int = Field(1, ge=1)  # how often each of its items appears per epoch


class SliceConfig(Section):
    """Training on axial slices: which ones, and the size they are brought to."""

    size: int = Field(128, ge=16)  # pixels per axis
    fit: Literal["resample", "pad"] = "resample"
    """resample: the file's slice is padded to a square, which is resampled. pad: background is added, or cut off, around it; voxels stay as they are."""
    min_brain: float = Field(0.05, ge=0, lt=1)  # share of that square that is brain, at least
    region: Literal["WT", "TC", "ET"] | None = None  # that a training slice must show; None: labels are not looked at
    min_region_pixels: int = Field(10, ge=1)  # of it, after resampling


class AvailabilityConfig(Section):
    """What the student may see of an item, drawn anew for each one among the sequences that its subject has."""

    kind: Literal["uniform", "proper", "size_first", "rising", "fixed", "natural", "single"] = "uniform"
    """uniform: every non-empty subset equally likely. proper: of these every one that leaves something out. size_first: first how
    many, then which. rising: everything at first; the share of items with a uniform draw grows over `ramp_epochs`. fixed: one of
    `subsets`. natural: nothing is hidden. single: one sequence per subject, drawn once for the whole run (unpaired training)."""
    subsets: list[str] = []  # of kind fixed, e.g. ["t1", "t1+t2"], or one by its name
    ramp_epochs: float = Field(20.0, gt=0)  # of kind rising

    @field_validator("subsets", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _listed(self) -> "AvailabilityConfig":
        if (self.kind == "fixed") != bool(self.subsets):
            raise ValueError("give data.availability.subsets together with kind: fixed, and only then")
        return self


class DataConfig(Section):
    shards: list[ShardSetConfig] = Field(min_length=1)
    fold: int = Field(0, ge=0)
    crop: tuple[int, int, int] | None = None  # (X, Y, Z) voxels; volumes need it, or slices
    slices: SliceConfig | None = None  # for methods that work on axial slices
    foreground_share: float = Field(0.0, ge=0, le=1)  # share of crops centred on a labelled voxel; the rest uniform
    crops: Literal["fresh", "fixed"] = "fresh"  # fixed: an item's crop and augmentation are the same in every epoch
    augment: AugmentConfig = AugmentConfig()
    availability: AvailabilityConfig = AvailabilityConfig()  # a method may say otherwise for a stage of its own
    workers: int = Field(2, ge=0)  # loader processes per rank
    shuffle_window: int = Field(4, ge=1)  # tars whose subjects are mixed
    on_bad_sample: Literal["stop", "skip"] = "skip"  # skip: replace by another subject, say so and count it
    max_bad_samples: int = Field(10, ge=0)  # per stage; more skipped ones than that stop it
    verify_sha256: bool = False  # hash each tar when it is opened; its size and first header are checked always
    cache_dir: str | None = None  # node-local folder for staged tars
    cache_gib: float = Field(100.0, gt=0)
    synthetic: Literal["use", "hide"] = "use"  # hide: sequences that a network made (`mstkd predict`) count as missing
    allow_overlap: bool = False  # train and test sharing a subject is otherwise refused

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("shards"), str):
            values = {**values, "shards": [{"path": values["shards"]}]}
        return values


class OffloadConfig(Section):
    """What lives in host memory instead of the accelerator's (DeepSpeed's ZeRO-Offload)."""

    optimizer: bool = False  # moments and fp32 update; ZeRO 1-3
    parameters: bool = False  # ZeRO 3


class RoleConfig(Section):
    """Overrides of what the method declares, and `train` says, for one role."""

    optimizer: OptimizerConfig | None = None
    schedule: ScheduleConfig | None = None
    zero_stage: Literal[0, 1, 2, 3] | None = None
    offload: OffloadConfig | None = None
    gradient_clipping: float | None = Field(None, ge=0)


Precision = Literal["fp32", "bf16", "fp16"]  # bf16, fp16: autocast over fp32 weights; fp16 with a dynamic loss scale


class TrainConfig(Section):
    global_batch: int = Field(ge=1)  # G = ranks x micro_batch x accumulation
    micro_batch: int = Field(1, ge=1)
    steps: int | dict[str, int] | None = None  # of each stage, or by stage
    epochs: float | None = Field(None, gt=0)
    precision: Precision = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: OffloadConfig = OffloadConfig()
    recompute: bool = False  # activation checkpointing of the method's blocks: less memory, one more forward
    compile: bool = False  # torch.compile of every network but those that a role differentiates twice, which it cannot
    deterministic: bool = False  # the same bits in every run on the same machine; slower on GPUs
    deepspeed: dict[str, Any] = {}  # or the path of a DeepSpeed JSON file; "auto" is filled in from the keys above
    gradient_clipping: float = Field(0.0, ge=0)  # global L2 norm; 0 = off
    max_skipped: int = Field(5, ge=0)  # consecutive non-finite steps before the run stops; with fp16 those count that no lower loss scale can help
    log_every: int = Field(10, ge=1)
    roles: dict[str, RoleConfig] = {}

    @field_validator("steps", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        counts = list(value.values()) if isinstance(value, dict) else [value]
        if value is not None and not (counts and all(type(count) is int and count >= 1 for count in counts)):
            raise ValueError("give a number of steps from 1, or one for each stage, e.g. {teacher: 100, student: 200}")
        return value

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_deepspeed(cls, value: Any) -> Any:
        return read_json(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs, and set the other one to null")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"train.global_batch {self.global_batch} is not a multiple of train.micro_batch {self.micro_batch}")
        return self

    def accumulation(self, world: int) -> int:
        """a = G / (world x micro). Raises UserError naming the rank counts that work."""
        accumulation, rest = divmod(self.global_batch, self.micro_batch * world)
        if rest == 0:
            return accumulation
        micro_batches = self.global_batch // self.micro_batch
        *some, last = [str(n) for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        works = f"{', '.join(some)} or {last} ranks" if some else "1 rank"
        raise UserError(f"train.global_batch {self.global_batch} with micro_batch {self.micro_batch} runs on {works}, not {world}")


class CheckpointConfig(Section):
    every_steps: int = Field(500, ge=1)
    every_min: float | None = Field(30.0, gt=0)  # also after this much time
    keep: int = Field(2, ge=1)  # newest k, besides the best
    keep_every: int | None = Field(None, ge=1)  # and those of every n-th step
    on_failure: Literal["stop", "continue"] = "stop"  # when one cannot be written (disk full); the last sound one stays
    background: bool = False  # updates go on while it is written: each rank's files then lie in host memory first

    def most_copies(self, steps: int) -> int:
        """Of a stage of so many steps, at one moment: the newest ones, the best one, the one being written, those of every n-th step."""
        return self.keep + 2 + (steps // self.keep_every if self.keep_every else 0)


class WatchdogConfig(Section):
    """How a run that hangs is noticed; more in mstkd/engine/heartbeat.py."""

    heartbeat_s: float = Field(10.0, gt=0)  # how often each rank writes its sign of life
    hang_min: float = Field(20.0, gt=0)  # without progress for so long the run ends and names the rank that holds it up
    collective_min: float = Field(60.0, gt=0)  # the process group's own limit; above hang_min, so that a name comes first

    @model_validator(mode="after")
    def _name_first(self) -> "WatchdogConfig":
        if self.collective_min <= self.hang_min:
            raise ValueError(f"watchdog.collective_min {self.collective_min:g} must be above watchdog.hang_min {self.hang_min:g}")
        return self


class InferenceConfig(Section):
    """Whole-volume prediction by sliding window."""

    window: tuple[int, int, int] | None = None  # default: the training crop
    overlap: float = Field(0.5, ge=0, lt=1)
    batch: int = Field(1, ge=1)  # windows per forward
    blend: Literal["gaussian", "uniform"] = "gaussian"  # weights of a window's voxels
    average: Literal["logits", "probabilities"] = "logits"  # what is averaged over windows; probabilities: of each channel by itself
    mirror: bool | Annotated[str, Field(pattern="^x?y?z?$")] = False
    """Also predict every window mirrored along these axes, each and all together, and average: 2, 4 or 8 times the work. true: those
    that training mirrored; no others can be named."""
    postprocess: Literal["none", "cc+et", "cc+cluster+et"] = "none"  # of tumour label maps, see mstkd/evaluate/postprocess.py
    largest_component: list[str] = []  # regions of which no other component is kept
    min_volume_ml: dict[str, Annotated[float, Field(gt=0)]] = {}  # by region: smaller components become what is around them
    precision: Precision | None = None  # default: as in training


class ValidateConfig(Section):
    every_steps: int = Field(1000, ge=1)
    subsets: list[str] | None = None  # e.g. ["flair", "t1+t1ce"]; default: all 2^M - 1, or as evaluate.given says
    max_cases: int | None = Field(None, ge=1)  # first n of the fold's validation subjects


class EvaluateConfig(Section):
    networks: list[str] | None = None  # default: all that the method scores
    complete: str | None = None  # a synthesis run: what a case is not given is completed by it first, and the networks see every sequence
    given: Literal["subsets", "present"] = "subsets"  # present: each case once, with all that it has, instead of every subset; validation alike
    hd95: Literal["directed_max", "pooled"] = "directed_max"
    empty: Literal["penalty", "reference"] = "penalty"  # one-empty HD95: the image diagonal, or 0 as in the reference code
    assd: bool = False  # the average symmetric surface distance, too
    lesion_wise: bool | None = None  # Dice and HD95 by lesion; default: where there are tumours (WT, TC, ET)
    calibration: bool = False  # ECE of each region's probability, too


class TrackingConfig(Section):
    uri: str | None = None  # default: sqlite in runs_dir
    experiment: str = "mstkd"
    identify: bool = False  # let subject keys, host and user into MLflow
    log_model: bool = False  # segmentations: `mstkd evaluate` puts the student into MLflow, ready to be served; as large as its weights
    register_as: str | None = None  # and makes it the next version of this registered model

    @model_validator(mode="after")
    def _something_to_register(self) -> "TrackingConfig":
        if self.register_as is not None and not self.log_model:
            raise ValueError("tracking.register_as needs tracking.log_model=true: what is registered is the logged model")
        return self


class TeacherConfig(Section):
    """Frozen networks: those that a stage takes from an earlier one, or from outside."""

    path: str | dict[str, str | dict[str, str]] | None = None
    """A run folder or a file of weights; or one by network, {keeper: RUN, base: FILE}, or by part of a network, {base: {encoder: FILE,
    decoder: FILE}}. The stages that would train these networks are left out."""
    network: str | None = None  # which network of `path`, if that is one; default: the one of the same name, or the only one there
    placement: Literal["replicate", "zero3", "cpu"] = "replicate"
    """replicate: whole on every rank. zero3: cut over the ranks, gathered layer by layer. cpu: as zero3, the parts in host memory."""
    cache_dir: str | None = None  # node-local folder for its outputs; needs data.crops=fixed
    cache_gib: float = Field(20.0, gt=0)


class ProfileConfig(Section):
    steps: str | None = Field(None, pattern=r"^\d+(-\d+)?$", coerce_numbers_to_str=True)  # e.g. 10-12: a torch profiler trace of these updates of each stage

    @model_validator(mode="after")
    def _forwards(self) -> "ProfileConfig":
        first, _, last = (self.steps or "1").partition("-")
        if not 1 <= int(first) <= int(last or first):
            raise ValueError(f"profile.steps {self.steps}: give one update or a range, counted from 1, e.g. 10-12")
        return self


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0)
    runs_dir: str = "runs"
    resume: Literal["auto", "required", "never"] = "auto"
    init_from: str | None = None  # warm start: a run folder or a safetensors file
    method: dict[str, Any]
    stages: list[str] | None = None  # default, and "all": all of the method's
    data: DataConfig
    train: TrainConfig
    teacher: TeacherConfig = TeacherConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    inference: InferenceConfig = InferenceConfig()
    validation: ValidateConfig = Field(ValidateConfig(), alias="validate")  # pydantic owns the name `validate`
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()
    profile: ProfileConfig = ProfileConfig()
    _origin: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("stages", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if value == "all":
            return None
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _method_named(self) -> "RunConfig":
        if not isinstance(self.method.get("name"), str):
            raise ValueError("method.name is missing: say which method to train, e.g. mst_kdnet")
        return self

    @model_validator(mode="after")
    def _cache_can_hit(self) -> "RunConfig":
        if self.teacher.cache_dir is not None and self.data.crops != "fixed":
            raise ValueError("teacher.cache_dir needs data.crops=fixed: a fresh crop is never seen again")
        if self.teacher.cache_dir is not None and self.teacher.placement != "replicate":
            raise ValueError(f"teacher.cache_dir needs teacher.placement=replicate: with {self.teacher.placement} every call takes all ranks")
        return self

    @model_validator(mode="after")
    def _inference_as_trained(self) -> "RunConfig":
        if self.inference.precision is None:
            self.inference = self.inference.model_copy(update={"precision": self.train.precision})
        return self

    @model_validator(mode="after")
    def _mirrored_as_trained(self) -> "RunConfig":
        if not self.inference.mirror:
            return self
        augment = self.data.augment
        trained = augment.flip_axes if augment.flip_prob > 0 else ""
        asked = trained if self.inference.mirror is True else self.inference.mirror
        if not trained or not set(asked) <= set(trained):
            mirrored = f"mirrored {trained} alone (data.augment.flip_axes)" if trained else "mirrored nothing (data.augment.flip_prob, flip_axes)"
            raise ValueError(f"inference.mirror: training {mirrored}, and the network knows no other image; {'name those' if trained else 'leave it out'}")
        self.inference = self.inference.model_copy(update={"mirror": asked})
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def origin(self) -> dict[str, str]:
        """Where each key was given, for messages: {"train.steps": "recipe.yaml:12"}."""
        return self._origin


def load_config(recipe: str, overrides: list[str] = ()) -> RunConfig:
    """Defaults <- recipe file <- dotted overrides ("train.steps=100"). Raises UserError."""
    return read_recipe(find_recipe(recipe), overrides)


def read_recipe(path: Path, overrides: list[str] = ()) -> RunConfig:
    """As `load_config`, for the file at `path`."""
    values, origin = read_with_overrides(path, overrides)
    config = validate_section(RunConfig, values, "", path.name, origin)
    config._origin = origin
    return config


def resolved(config: RunConfig) -> dict:
    """The whole configuration as plain data, with the names that a recipe uses."""
    return config.model_dump(mode="json", by_alias=True)

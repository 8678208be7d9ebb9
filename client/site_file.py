"""The site file: one YAML that says what a hospital has.

schema: fedbridge.site/1
site: north                       # the agreed name
folder: recordings                # paths are relative to this file
reader: {name: npz, options: {...}}
old: {modality: ECG, channels: [II], rate_hz: 125}
new: {modality: PPG, channels: [PLETH], rate_hz: 125}
window: {seconds: 10, step_seconds: 10}
labels: {source: csv, path: labels.csv, classes: [low, normal, high]}
splits: {pair: 0.6, validation: 0.1, test: 0.3}
models: {old_encoder: models/old_encoder, new_encoder: models/new_encoder, task_head: models/task_head}
policy: policy.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from bridge.compute import DeviceChoice, Precision
from bridge.config import Settings
from bridge.hashing import keyed_hash
from bridge.messages import SITE_NAME
from bridge.windows import Modality
from client.errors import SiteFileError

Role = Literal["old", "new"]
Split = Literal["pair", "validation", "test"]
SPLITS: tuple[Split, ...] = ("pair", "validation", "test")


class ReaderSection(Settings):
    """Which reader turns files into recordings."""

    name: str = "npz"
    """npz, wfdb, edf, isruc, fog, wesad, or the entry point of an own reader."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The reader's own keys (docs/own-reader.md)."""


class SignalSection(Settings):
    """One modality as the recordings hold it."""

    modality: Modality
    """Which kind of signal."""
    channels: tuple[str, ...] = Field(min_length=1)
    """Channels that every recording has; the encoder's card picks its own from them by name."""
    rate_hz: float = Field(gt=0)
    """Sampling rate of the recordings; a file with another one is refused."""


class WindowSection(Settings):
    """How recordings are cut."""

    seconds: float = Field(gt=0)
    """Length of a window; must be that of both encoders' cards."""
    step_seconds: float = Field(gt=0)
    """From the start of one window to the next, counted from the start of each segment."""


class LabelsSection(Settings):
    """Labels for evaluation, where the site has any. The bridge is trained without."""

    source: Literal["none", "recording", "csv"] = "none"
    """`recording`: from the reader; `csv`: from `path`."""
    path: Path | None = None
    """CSV with the columns recording, start_seconds, end_seconds, label and, if wanted, group."""
    classes: tuple[str, ...] = ()
    """Label texts in the order of the task head's classes."""
    coverage: float = Field(default=1.0, gt=0.5, le=1)
    """Share of a window that one label must cover."""
    unlabelled: Literal["keep", "reject"] = "keep"
    """What becomes of a window without one label: kept (label -1), or rejected and counted."""

    @model_validator(mode="after")
    def _complete(self) -> LabelsSection:
        if self.source != "none" and len(self.classes) < 2:
            raise ValueError("labels.classes must list at least 2 classes")
        if self.source == "none" and self.unlabelled == "reject":
            raise ValueError("unlabelled 'reject' needs a source of labels")
        if (self.source == "csv") != (self.path is not None):
            raise ValueError("labels.path is needed for source 'csv', and only there")
        return self


class QualitySection(Settings):
    """When a window is rejected, judged on the raw signal. Windows with a gap or NaN are always rejected."""

    flat_share: float = Field(default=0.2, gt=0, le=1)
    """A window is flat if one channel stands still for a longer share of it in one stretch."""
    flat_tolerance: float = Field(default=0.0, ge=0)
    """Largest change from sample to sample that still counts as standing still, in the signal's unit."""
    clipped_share: float = Field(default=0.02, gt=0, le=1)
    """A window is clipped if one channel spends a larger share of it at its own extreme values, in stretches of
    `clipped_run` samples or more."""
    clipped_run: int = Field(default=3, ge=2)
    """Fewer equal samples at an extreme are a peak."""
    length_tolerance_seconds: float = Field(default=1.0, ge=0)
    """The two signals of a recording may begin or end apart by so much; beyond it, the recording is refused."""


class SplitsSection(Settings):
    """Which patients do what: three lists of patients, or three fractions shared out by a keyed hash of the patient."""

    pair: float | tuple[str, ...] = 0.7
    """Give the pairs for selection and training."""
    validation: float | tuple[str, ...] = 0.0
    """Judge rounds, where a job asks for it."""
    test: float | tuple[str, ...] = 0.3
    """Judge the final bridge."""
    key: str = "fedbridge"
    """Key of the hash, for fractions: another key, another division."""

    @field_validator("pair", "validation", "test", mode="before")
    @classmethod
    def _ids_are_texts(cls, value: Any) -> Any:
        # YAML reads an unquoted patient id 12 as a number.
        return tuple(str(each) for each in value) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _consistent(self) -> SplitsSection:
        values = (self.pair, self.validation, self.test)
        fractions = [value for value in values if isinstance(value, float)]
        lists = [value for value in values if isinstance(value, tuple)]
        if fractions and lists:
            raise ValueError("pair, validation and test must be all lists or all fractions")
        if fractions and (min(fractions) < 0 or sum(fractions) > 1 + 1e-9):
            raise ValueError("fractions must not be negative nor sum to more than 1")
        patients = [patient for value in lists for patient in value]
        if len(set(patients)) != len(patients):
            raise ValueError("a patient must be in one split, once")
        return self

    @property
    def listed(self) -> frozenset[str]:
        """All patients of the lists; empty for fractions."""
        values = (self.pair, self.validation, self.test)
        return frozenset(patient for value in values if isinstance(value, tuple) for patient in value)

    def of(self, patient: str) -> Split | None:
        """The split of a patient; None where it is in no list, or the fractions leave it over."""
        draw, edge = keyed_hash(self.key, patient) / 2.0**64, 0.0
        for split, value in zip(SPLITS, (self.pair, self.validation, self.test), strict=True):
            if isinstance(value, tuple):
                if patient in value:
                    return split
            else:
                edge += value
                if draw < edge:
                    return split
        return None


class ModelsSection(Settings):
    """Folders of the three frozen models (card.json and weights.safetensors)."""

    old_encoder: Path
    """Reads the old modality."""
    new_encoder: Path
    """Reads the new modality."""
    task_head: Path
    """Classifies the old encoder's final tokens."""


class CacheSection(Settings):
    """Where frozen features are kept between messages."""

    folder: Path = Path("cache")
    """May be shared by several sites of one machine."""
    max_gigabytes: float = Field(default=20.0, gt=0)
    """Beyond it, what was used least recently is deleted."""


class ComputeSection(Settings):
    """How this machine runs the frozen networks. In float32 results agree to 1e-5, whatever these keys say."""

    device: DeviceChoice = "cpu"
    """`auto`: a CUDA device where torch finds one, else the processor."""
    precision: Precision = "float32"
    """`bfloat16` and `float16` are for CUDA alone: faster, in less memory, and with other numbers; features are then
    computed anew."""
    memory_gigabytes: float | None = Field(default=None, gt=0)
    """What the networks' activations of a batch may take; fewer windows go at a time, or activations are computed
    twice, where it would be more. null: a quarter of the memory that is free."""

    @model_validator(mode="after")
    def _precision_has_a_device(self) -> ComputeSection:
        if self.precision != "float32" and self.device == "cpu":
            raise ValueError(
                f"precision {self.precision} is for CUDA alone: set device to auto or cuda, or use float32"
            )
        return self


class DeploymentSection(Settings):
    """A site on a machine of its own: where its part of Flower keeps things (`fedbridge-site init`)."""

    coordinator: Path = Path("coordinator.yaml")
    """The coordinator's file, as it was handed over."""
    keys: Path = Path("keys")
    """Folder of the node's secret key and the executor's secret; its owner alone may read it."""
    studies: Path = Path("studies")
    """Folder of the studies that were accepted."""
    state: Path = Path("state")
    """Folder of Flower's own files, of process ids and of what the services print."""
    port: int = Field(default=9094, ge=1, le=65535)
    """Port on 127.0.0.1 over which SuperNode and executor of this site talk; another for each site of a machine."""


class SiteFile(Settings):
    """The keys of a site file. Relative paths are relative to the file."""

    schema_: Literal["fedbridge.site/1"] = Field(default="fedbridge.site/1", alias="schema")
    """Version of these keys."""
    site: str
    """The site's agreed name: a plain word, known to the coordinator."""
    reader: ReaderSection = ReaderSection()
    folder: Path
    """Folder of the recordings."""
    exclude: tuple[str, ...] = ()
    """Names of files or recordings to leave out on purpose (wildcards allowed); `check` counts them."""
    old: SignalSection | None = None
    """The modality with the labels; may be left out where only predictions are made."""
    new: SignalSection | None = None
    """The modality that should replace it."""
    window: WindowSection
    labels: LabelsSection = LabelsSection()
    quality: QualitySection = QualitySection()
    splits: SplitsSection = SplitsSection()
    models: ModelsSection | None = None
    policy: Path | None = None
    """The site's policy; without one the strictest defaults hold."""
    cache: CacheSection = CacheSection()
    compute: ComputeSection = ComputeSection()
    audit: Path = Path("audit.jsonl")
    """The log of everything that left the site."""
    ledger: Path = Path("ledger.sqlite")
    """What private runs have cost each patient; the site's secret key lies beside it, as `<name>.key`. Keep both for
    as long as the recordings are used, outside any run's folder."""
    log: Path = Path("site.log")
    """Errors in full, for the site's engineer alone."""
    deployment: DeploymentSection = DeploymentSection()
    """For a site on a machine of its own."""

    @field_validator("site")
    @classmethod
    def _is_a_plain_word(cls, value: str) -> str:
        if not SITE_NAME.match(value):
            raise ValueError("the name leaves the site: letters, digits, '.', '_', '-', at most 63, no space")
        return value

    @model_validator(mode="after")
    def _has_signals(self) -> SiteFile:
        if self.old is None and self.new is None:
            raise ValueError("one of 'old' and 'new' is needed")
        if self.old is not None and self.new is not None and self.old.modality == self.new.modality:
            raise ValueError(f"old and new are both {self.old.modality}: two modalities are needed")
        return self

    def section(self, role: Role) -> SignalSection:
        """`old` or `new`; raises `SiteFileError` where the file leaves it out."""
        section = self.old if role == "old" else self.new
        if section is None:
            raise SiteFileError(
                f"the site file of '{self.site}' has no key '{role}'",
                why=f"windows of the {role} modality are asked for",
                fix=f"describe the {role} modality, if the recordings hold it",
            )
        return section


def write_site_file(path: Path, file: SiteFile) -> None:
    """Write a site file that `open_site` reads back as an equal one; keys at their defaults are left out."""
    content = file.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    text = yaml.safe_dump({"schema": file.schema_, **content}, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")

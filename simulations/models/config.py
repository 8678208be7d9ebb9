"""The section `encoders`: where a simulation's two frozen networks and its task head come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from bridge.config import Settings
from bridge.encoders.cards import EncoderCard, read_card
from bridge.encoders.compact import CompactArchitecture
from bridge.encoders.convert import window_for
from bridge.encoders.pretrain import PretrainSettings, SupervisedSettings
from bridge.encoders.published import PublishedModel, published_model
from bridge.encoders.recipes import RECIPES
from bridge.errors import ConfigError
from bridge.head_fit import HeadSettings
from bridge.windows import Preprocessing, WindowSpec
from simulations.source import SignalSource

Size = Literal["base", "small", "large"]


class PublishedConfig(Settings):
    """A published foundation model, converted from its official file for the windows of the source."""

    model: Literal["labram", "hubert-ecg", "papagei", "normwear", "ecg-fm"]
    """Its name, as `fedbridge-sim weights list` tells it; its rate and its authors' preprocessing come with it."""
    file: Path
    """The official file, as it was published; relative to this configuration."""
    size: Size | None = None
    """Which size the file has, for a model of several: the plan counts with it, and another file is refused."""
    options: dict[str, str | int] = Field(default_factory=dict)
    """Options of the conversion, as `weights list` tells them; the defaults where left out."""

    @field_validator("options", mode="before")
    @classmethod
    def _words_of_yaml(cls, value: Any) -> Any:
        # YAML reads on and off as yes and no.
        if not isinstance(value, dict):
            return value
        return {key: ("off", "on")[each] if isinstance(each, bool) else each for key, each in value.items()}

    @model_validator(mode="after")
    def _is_a_model(self) -> Self:
        sizes = [] if len(self.known.parameters) == 1 else list(self.known.parameters)
        if sizes and self.size is None:
            raise ValueError(f"{self.model} comes in sizes: give size as one of {', '.join(sizes)}")
        if not sizes and self.size is not None:
            raise ValueError(f"{self.model} has one size alone: leave size out")
        try:
            self.known.check_options(self.options)
        except ConfigError as error:
            raise ValueError(f"{error.what}; {error.fix}") from error
        return self

    @property
    def known(self) -> PublishedModel:
        """What is known of the model."""
        return published_model(self.model)


class NewEncoderConfig(Settings):
    """The new modality's encoder: never sees a label. Trained here (compact), published, or ready in a folder."""

    published: PublishedConfig | None = None
    """A published model in the place of a compact one."""
    folder: Path | None = None
    """A ready model folder in the place of a compact one: own, or converted; its card names windows and preprocessing.
    Relative to this configuration."""
    rate_hz: float | None = Field(default=None, gt=0)
    """Compact: sampling rate that it reads; null: the recordings' own."""
    preprocessing: Preprocessing = Preprocessing()
    """Compact: steps from a recording to its windows, the same in training and at every site."""
    architecture: CompactArchitecture = CompactArchitecture()
    """Compact: its sizes."""
    pretrain: PretrainSettings = PretrainSettings()
    """Compact: training without labels."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.published is not None and self.folder is not None:
            raise ValueError("published and folder each name the encoder: give one of them, the other null")
        if not self.is_compact:
            fields = type(self).model_fields
            given = [name for name in _COMPACT if name in fields and getattr(self, name) != fields[name].default]
            if given:
                origin = "published" if self.published is not None else "folder"
                raise ValueError(
                    f"{origin} names the encoder: leave out the keys of a compact one ({', '.join(given)})"
                )
        return self

    @property
    def is_compact(self) -> bool:
        """Whether the encoder is trained here."""
        return self.published is None and self.folder is None

    def spec(self, signal: SignalSource, seconds: float) -> WindowSpec:
        """The windows that the encoder will read, of a source's signal.

        Raises `ConfigError` where no such windows can be cut and `WeightsError` where a folder holds no model.
        """
        if self.published is not None:
            return window_for(self.published.known, signal.channels, seconds, modality=signal.modality)
        if self.folder is not None:
            return _fitting(read_card(self.folder, EncoderCard), self.folder, signal, seconds)
        rate = self.rate_hz or signal.rate_hz
        return WindowSpec(
            modality=signal.modality, channels=signal.channels, rate_hz=rate, samples=round(seconds * rate)
        )

    def steps(self, *, by_window: bool) -> Preprocessing:
        """From a recording to those windows; `by_window` where recordings are cut into epochs of their own.

        Raises `WeightsError` where a folder holds no model.
        """
        if self.published is not None:
            recipe = RECIPES[self.published.model]
            return recipe.by_window() if by_window else recipe
        if self.folder is not None:
            return read_card(self.folder, EncoderCard).preprocessing
        return self.preprocessing

    def placed(self, base: Path) -> Self:
        """The same with every path absolute; relative ones are relative to `base`."""
        changed: dict[str, Any] = {}
        if self.published is not None:
            changed["published"] = self.published.model_copy(update={"file": _absolute(base, self.published.file)})
        if self.folder is not None:
            changed["folder"] = _absolute(base, self.folder)
        return self.model_copy(update=changed)


class HeadConfig(HeadSettings):
    """The task head of a published or ready old encoder: fitted on the public patients, or ready in a folder."""

    folder: Path | None = None
    """A ready head, fitted on exactly this old encoder: nothing is fitted. Relative to this configuration."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.folder is not None and self.settings() != HeadSettings():
            raise ValueError("folder names a head that is fitted already: leave the settings of its fit out")
        return self

    def settings(self) -> HeadSettings:
        """How it is fitted."""
        return HeadSettings(**{name: getattr(self, name) for name in HeadSettings.model_fields})


class OldEncoderConfig(NewEncoderConfig):
    """The old modality's encoder. A compact one is pretrained without labels, then trained with the task head."""

    pretrain: PretrainSettings = PretrainSettings(steps=200)
    supervised: SupervisedSettings = SupervisedSettings()
    """Compact: training with labels, together with the head."""
    head: HeadConfig | None = None
    """Published or folder: its head; null: fitted with the defaults."""

    @model_validator(mode="after")
    def _head_of_a_ready_encoder(self) -> Self:
        if self.is_compact and self.head is not None:
            raise ValueError("a compact encoder is trained with its head (supervised): leave head out")
        return self

    def placed(self, base: Path) -> Self:
        """The same with every path absolute; relative ones are relative to `base`."""
        placed = super().placed(base)
        if self.head is None or self.head.folder is None:
            return placed
        head = self.head.model_copy(update={"folder": _absolute(base, self.head.folder)})
        return placed.model_copy(update={"head": head})


_COMPACT = ("rate_hz", "preprocessing", "architecture", "pretrain", "supervised")
"""Keys that count for a compact encoder alone."""

READY = {"published", "folder", "head"}
"""Keys that count for the others alone."""


class EncodersConfig(Settings):
    """Both encoders and the head."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int = Field(default=1, ge=1)
    """Torch threads of each of the two training processes; another number gives other weights in the last digits."""
    public_vectors: int = Field(default=128, ge=1)
    """Centroids kept for each old position."""
    old: OldEncoderConfig = OldEncoderConfig()
    new: NewEncoderConfig = NewEncoderConfig()

    @property
    def are_compact(self) -> bool:
        """Whether both encoders are trained here."""
        return self.old.is_compact and self.new.is_compact

    def placed(self, base: Path) -> EncodersConfig:
        """The same with every path absolute; relative ones are relative to `base`."""
        return self.model_copy(update={"old": self.old.placed(base), "new": self.new.placed(base)})


def _absolute(base: Path, path: Path) -> Path:
    return (base / path.expanduser()).resolve()


def _fitting(card: EncoderCard, folder: Path, signal: SignalSource, seconds: float) -> WindowSpec:
    """The card's windows, where a source's signal can give them; raises `ConfigError`."""
    window = card.window
    unknown = [name for name in window.channels if name not in signal.channels]
    if window.modality == signal.modality and not unknown and abs(window.seconds - seconds) < 1e-6:
        return window
    raise ConfigError(
        f"{folder}: the encoder does not read what the recordings have",
        why=f"it reads {window.seconds:g} s of {window.modality} ({', '.join(window.channels)}), "
        f"they give {seconds:g} s of {signal.modality} ({', '.join(signal.channels)})",
        fix="choose another model folder, or change the source's window",
    )

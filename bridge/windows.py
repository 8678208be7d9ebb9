"""What one window of one modality is, and the preprocessing that leads to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bridge.errors import WindowError

Modality = Literal["ECG", "PPG", "EEG", "EMG"]


class WindowSpec(BaseModel):
    """One fixed-length cut of one modality as an encoder reads it: `(channels, samples)` at `rate_hz`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    modality: Modality
    channels: tuple[str, ...] = Field(min_length=1)
    rate_hz: float = Field(gt=0)
    samples: int = Field(gt=0)

    @property
    def seconds(self) -> float:
        """Length of a window in seconds."""
        return self.samples / self.rate_hz

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise `WindowError` unless `shape` is `(batch, channels, samples)` of this spec."""
        wanted = (len(self.channels), self.samples)
        if len(shape) != 3 or shape[1:] != wanted:
            raise WindowError(
                f"{self.modality} windows of shape {shape} do not fit the encoder",
                why=f"it reads (batch, {wanted[0]} channels, {wanted[1]} samples) at {self.rate_hz:g} Hz",
                fix="cut the windows with the WindowSpec of the encoder's card",
            )


def _is_empty(value: tuple[object, ...]) -> bool:
    return not value


def _is_run(value: str) -> bool:
    return value == "run"


class Resampling(BaseModel):
    """Resampling of a whole recording to `int(samples * new rate / old rate)` samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["resample"] = "resample"
    method: Literal["linear", "fourier"]
    """`linear` interpolates with the first and the last sample of old and new laid onto each other; `fourier` cuts or
    pads the spectrum, as if the recording went on in a circle."""
    rate_hz: float | None = Field(default=None, gt=0)
    """The new rate; null is that of the encoder's windows."""


class FirBandpass(BaseModel):
    """A windowed-sinc band-pass (Hamming) that runs forwards and backwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["fir_bandpass"] = "fir_bandpass"
    taps: int = Field(ge=3)
    band_hz: tuple[float, float]


class ChebyshevBandpass(BaseModel):
    """A Chebyshev band-pass of type I that runs forwards and backwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: Literal["chebyshev_bandpass"] = "chebyshev_bandpass"
    order: int = Field(ge=1, le=8)
    ripple_db: float = Field(gt=0)
    band_hz: tuple[float, float]


Stage = Annotated[Resampling | FirBandpass | ChebyshevBandpass, Field(discriminator="step")]
"""One of the steps of a published model, told by its name in `step`."""


class Preprocessing(BaseModel):
    """Named steps from a recording to an encoder's window, in the order of the fields.

    The zero-phase filters run over a gap-free segment at the recording's own rate; polyphase resampling to the
    `WindowSpec`'s rate follows, then `normalise` and `clip`. A published model names its authors' steps in `stages`
    instead, since a frozen network should read what it was trained on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float = Field(default=1.0, gt=0)
    """Multiplies the raw values."""
    bandpass_hz: tuple[float | None, float | None] = (None, None)
    """Edges of the band in Hz; null leaves an edge open."""
    filter_order: int = Field(default=2, ge=1, le=8)
    """Order of the Butterworth filter, which runs forwards and backwards."""
    notch_hz: float | None = Field(default=None, gt=0)
    """Mains frequency to take out."""
    stages: tuple[Stage, ...] = Field(default=(), exclude_if=_is_empty)
    """Steps in the order in which they run, in the place of band-pass and notch: `{step: resample, method: linear |
    fourier, rate_hz}`, `{step: fir_bandpass, taps, band_hz}`, `{step: chebyshev_bandpass, order, ripple_db, band_hz}`;
    `rate_hz: null` is the rate of the encoder's windows."""
    over: Literal["run", "window"] = Field(default="run", exclude_if=_is_run)
    """What the steps see at once: a gap-free segment, or one window by itself (recordings that are cut into epochs)."""
    normalise: Literal["window", "segment", "recording", "none"] = "window"
    """Zero mean and unit deviation of each channel over the window, the gap-free segment, or all of the recording's."""
    clip: float | None = Field(default=None, gt=0)
    """Bound of the normalised values."""

    def by_window(self) -> Preprocessing:
        """The same steps over each window by itself, normalised by it where these normalise at all."""
        normalise = "none" if self.normalise == "none" else "window"
        return self.model_copy(update={"over": "window", "normalise": normalise})

    @model_validator(mode="after")
    def _edges_in_order(self) -> Preprocessing:
        low, high = self.bandpass_hz
        if (low is not None and low <= 0) or (high is not None and high <= (low or 0.0)):
            raise ValueError(f"bandpass_hz must be [low, high] with 0 < low < high, not [{low}, {high}]")
        for stage in self.stages:
            if not isinstance(stage, Resampling) and not 0 < stage.band_hz[0] < stage.band_hz[1]:
                raise ValueError(f"band_hz must be [low, high] with 0 < low < high, not {list(stage.band_hz)}")
        return self

    @model_validator(mode="after")
    def _one_way_to_filter(self) -> Preprocessing:
        if self.stages and (self.bandpass_hz != (None, None) or self.notch_hz is not None):
            raise ValueError("name a band-pass or notch among the stages, or leave stages out")
        if self.over == "window" and self.normalise not in ("window", "none"):
            raise ValueError(f"over: window can't be normalised by the {self.normalise}")
        return self

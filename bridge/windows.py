"""What one window of one modality is, and the preprocessing that leads to it."""

from __future__ import annotations

from typing import Literal

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


class Preprocessing(BaseModel):
    """Named steps from a recording to an encoder's window, in the order of the fields.

    The zero-phase filters run over a gap-free segment at the recording's own rate; polyphase resampling to the
    `WindowSpec`'s rate follows, then `normalise` and `clip`.
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
    normalise: Literal["window", "segment", "recording", "none"] = "window"
    """Zero mean and unit deviation of each channel over the window, the gap-free segment, or all of the recording's."""
    clip: float | None = Field(default=None, gt=0)
    """Bound of the normalised values."""

    @model_validator(mode="after")
    def _edges_in_order(self) -> Preprocessing:
        low, high = self.bandpass_hz
        if (low is not None and low <= 0) or (high is not None and high <= (low or 0.0)):
            raise ValueError(f"bandpass_hz must be [low, high] with 0 < low < high, not [{low}, {high}]")
        return self

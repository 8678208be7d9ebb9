"""The knobs of the built-in cohort; docs/cohort.md explains the model behind them."""

from __future__ import annotations

from pydantic import Field, model_validator

from bridge.config import Settings


class CohortConfig(Settings):
    """Size and difficulty of the made-up world. The same values always give the same files, byte for byte."""

    public_old_patients: int = Field(default=96, ge=0)
    """Public patients who lend the labelled old modality (ECG) alone."""
    public_new_patients: int = Field(default=96, ge=0)
    """Public patients who lend the unlabelled new modality (PPG) alone."""
    hospital_patients: int = Field(default=84, ge=1)
    """Patients of the hospitals: both modalities, and labels for evaluation alone."""
    devices: int = Field(default=6, ge=1)
    """Kinds of monitor among the hospitals' patients, in equal numbers. Public recordings come from other monitors."""
    seconds: float = Field(default=240, gt=0)
    """Length of each patient's one recording."""
    window_seconds: float = Field(default=10, gt=0)
    step_seconds: float = Field(default=10, gt=0)
    dwell_seconds: float = Field(default=30, gt=0)
    """A hidden state holds for this long before the next is drawn: a multiple of the window."""
    classes: int = Field(default=3, ge=2, le=3)
    """The first so many of the states rest, stress and arrhythmia."""
    state_separation: float = Field(default=1.7, ge=0)
    """How far a state moves the body from its rest, 1 being mild; at 0 nothing distinguishes the states."""
    state_balance: float = Field(default=6.0, gt=0)
    """Dirichlet concentration of a patient's own mix of states: small, and patients differ in what they mostly have."""
    patient_variability: float = Field(default=0.85, ge=0)
    """Differences between bodies: rates, wave shapes, vessels, and how strongly each reacts to a state."""
    device_variability: float = Field(default=1.8, ge=0)
    """Differences between monitors: filters, bandwidth, delay, gain, noise, mains hum."""
    noise: float = Field(default=1.0, ge=0)
    """Sensor noise, muscle noise, baseline wander and hum, as a multiple of what monitors show."""
    artefacts_per_minute: float = Field(default=0.8, ge=0)
    """Movement in the PPG; the ECG has a third as many bursts of muscle and electrode artefact."""
    losses_per_hour: float = Field(default=4.0, ge=0)
    """Stretches of a lost electrode or probe, for each signal: marked missing, or flat without a mark."""
    ecg_rate_hz: float = Field(default=125, ge=60, le=1000)
    ppg_rate_hz: float = Field(default=64, ge=20, le=1000)
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _windows_fit(self) -> CohortConfig:
        ratio = self.dwell_seconds / self.window_seconds
        if ratio < 1 or abs(ratio - round(ratio)) > 1e-9:
            raise ValueError(f"dwell_seconds must be a multiple of window_seconds ({self.window_seconds:g})")
        if self.seconds < self.dwell_seconds:
            raise ValueError(f"seconds must be at least dwell_seconds ({self.dwell_seconds:g})")
        if self.step_seconds > self.window_seconds:
            raise ValueError(f"step_seconds must not exceed window_seconds ({self.window_seconds:g})")
        return self

"""The privacy section of a job: public numbers alone, the same at every site and at the server.

A noise multiplier is the noise's standard deviation in units of the sensitivity to one patient. A job that travels
holds noise multipliers; a configuration may name an epsilon instead, from which they are found before the run
(`bridge.privacy.calibration`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from bridge.config import Settings

MechanismName = Literal["none", "local", "central"]

GramName = Literal["public", "diagonal", "released"]
"""What the closed form's statistics say of the features' Gram matrix: nothing, means and squares, or all of it."""


class _Noised(Settings):
    noise_multiplier: float | None = Field(default=None, gt=0)
    """Standard deviation of the noise over the sensitivity."""
    epsilon: float | None = Field(default=None, gt=0)
    """Instead: what this phase may cost by itself; null in a phase that takes what `privacy.epsilon` leaves."""

    @model_validator(mode="after")
    def _one_of_both(self) -> _Noised:
        if self.noise_multiplier is not None and self.epsilon is not None:
            raise ValueError("give noise_multiplier or epsilon, not both")
        return self


class PrivateTraining(_Noised):
    """DP-SGD by patient (Abadi et al. 2016), with Poisson sampling of patients."""

    sampling_rate: float = Field(default=0.25, gt=0, le=1)
    """q: chance of each patient to be in a draw."""
    clip: float = Field(default=1.0, gt=0)
    """C: bound on the L2 norm of one patient's gradient."""
    divisor: float = Field(default=8.0, gt=0)
    """Public: what a site's sum is divided by, about q times the patients that a hospital is expected to have."""


class PrivateSelection(_Noised):
    """Scores of groups of patients, clipped and noised; two unsampled releases, probe and similarity."""

    groups: int = Field(default=8, ge=2, le=64)
    """K: groups of a site, filled by a keyed hash of the patient; about seven patients in each serve best."""
    clip: float = Field(default=0.05, gt=0)
    """R: bound on the L2 norm of a group's centred scores; one patient moves the sum by at most 2R."""


class PrivateClosedForm(_Noised):
    """One release of the sufficient statistics of a ridge regression."""

    clip: float = Field(default=0.5, gt=0)
    """R: bound on the L2 norm of one patient's statistics."""
    gram: GramName = "released"
    """The features' Gram matrix: wholly of the release; that of the whitened public features (the identity, `public`)
    with means and variances of the release (`diagonal`); or wholly public. Fewer numbers take less noise."""
    drop_below_noise: bool = True
    """Whether singular values of the map that noise alone would reach are dropped."""


class PrivateMetrics(_Noised):
    """Confusion tables of patients, each scaled to a joint L2 norm of at most one; a cohort of its own."""


class PrivacyJob(Settings):
    """The threat model by name and the numbers of its mechanism. A site refuses what its policy does not list."""

    mechanism: MechanismName = "none"
    """`none`: no formal guarantee. `local`: noise at the site. `central`: the server adds the noise to the sum."""
    epsilon: float | None = Field(default=None, gt=0)
    """What a patient of the paired recordings may lose in the whole run: the noise of training (or of the closed form)
    is found from what selection leaves."""
    delta: float = Field(default=1e-3, gt=0, lt=1)
    """Of each patient, over all phases."""
    patients_bound: int = Field(default=100, ge=1)
    """Public upper bound on the patients of one site; delta must be at most a tenth of its inverse."""
    training: PrivateTraining = PrivateTraining()
    selection: PrivateSelection = PrivateSelection()
    closed_form: PrivateClosedForm = PrivateClosedForm()
    metrics: PrivateMetrics = PrivateMetrics()
    simulation_seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Simulation only: noise and draws from a seed, for comparisons. A deployed site refuses a job that has one."""

    @property
    def private(self) -> bool:
        """Whether a formal guarantee is asked for."""
        return self.mechanism != "none"

    @property
    def gram(self) -> GramName:
        """What the closed form's statistics hold of the Gram matrix: all of it where no mechanism is asked for."""
        return self.closed_form.gram if self.private else "released"

    @model_validator(mode="after")
    def _delta_is_small(self) -> PrivacyJob:
        if self.private and self.delta * self.patients_bound > 0.1:
            raise ValueError(
                f"delta {self.delta:g} is too large for patients_bound {self.patients_bound}: a mechanism that gives "
                f"one patient away would satisfy it; use at most {0.1 / self.patients_bound:g}"
            )
        return self

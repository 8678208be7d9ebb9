"""The built-in cohort: paired ECG and PPG of made-up patients (docs/cohort.md tells the model)."""

from simulations.cohort.build import built_in_cohort, cohort_key
from simulations.cohort.config import CohortConfig

__all__ = ["CohortConfig", "built_in_cohort", "cohort_key"]

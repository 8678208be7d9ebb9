"""A study as one signed file: what a coordinator hands to hospitals, and what each of them accepts or refuses."""

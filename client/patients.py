"""Whose recordings a site has, read from the files themselves."""

from __future__ import annotations

from client.errors import RecordingError
from client.site import Site
from client.site_file import SPLITS, Split


def patients_of(site: Site) -> frozenset[str]:
    """The patients of all recordings that can be read. Raises as `Site.files`."""
    found = set()
    for path in site.files():
        try:
            found.add(site.reader.read(path).patient)
        except RecordingError:
            continue  # `fedbridge-site check` tells of it
    return frozenset(found)


def cohorts_of(site: Site) -> dict[Split, tuple[str, ...]]:
    """The patients of each split, sorted. Raises as `Site.files`."""
    cohorts: dict[Split, list[str]] = {split: [] for split in SPLITS}
    for patient in sorted(patients_of(site)):
        split = site.file.splits.of(patient)
        if split is not None:
            cohorts[split].append(patient)
    return {split: tuple(patients) for split, patients in cohorts.items()}

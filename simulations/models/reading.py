"""Windows of public patients, through a hospital's own data path: a site of some patients, for a moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from client.site import InputFormat, Site
from client.site_file import LabelsSection, SiteFile, SplitsSection
from simulations.config import SimulationConfig
from simulations.hospital_files import (
    common_keys,
    labels_section,
    members_of,
    signal_section,
    write_labels,
    write_recordings,
)
from simulations.models.signals import signals_of
from simulations.models.windows import PublicWindows
from simulations.source import PatientData, Source


def input_form(config: SimulationConfig, role: Literal["old", "new"]) -> InputFormat:
    """The windows that the encoder of a role will read, and the steps to them.

    Raises `ConfigError` and `WeightsError` where a published model or a folder can't give any.
    """
    signals = signals_of(config.data)
    encoder, signal = (config.encoders.old, signals.old) if role == "old" else (config.encoders.new, signals.new)
    window = encoder.spec(signal, signals.seconds)
    return InputFormat(window=window, preprocessing=encoder.steps(by_window=signals.by_window))


def public_windows(
    source: Source, patients: Sequence[str], config: SimulationConfig, role: Literal["old", "new"]
) -> PublicWindows:
    """All windows of public patients, of one modality; labels are read for the old one alone."""
    from client.windowing import windows_of

    is_old = role == "old"
    file = SiteFile(
        site=f"public-{role}",
        old=signal_section(source, "old") if is_old else None,
        new=None if is_old else signal_section(source, "new"),
        splits=SplitsSection(pair=tuple(patients), validation=(), test=()),
        labels=labels_section(source, config.data) if is_old else LabelsSection(),
        **common_keys(source),
    )
    form = input_form(config, role)
    with site_of(file, members_of(source, patients)) as site:
        if is_old:
            windows = windows_of(site, "pair", ("old",), {"old": form})
        else:
            windows = windows_of(site, "pair", ("new",), {"new": form})
    x = windows.old if is_old else windows.new
    assert x is not None
    return PublicWindows(x, windows.table.patients, windows.table.labels, form.window, form.preprocessing)


@contextmanager
def site_of(file: SiteFile, members: Sequence[PatientData]) -> Iterator[Site]:
    """A site of some patients for as long as the block lasts."""
    with TemporaryDirectory(prefix="fedbridge-public-") as name:
        place = Path(name)
        write_recordings(place / "recordings", members, copy=False)
        if file.labels.source == "csv":
            write_labels(place / "labels.csv", members)
        yield Site(place / "site.yaml", file)

"""The site folders of a study: for each hospital its site file, policy, labels and recordings."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from client.policy import Policy
from client.policy import template as policy_template
from client.site_file import (
    CacheSection,
    DeploymentSection,
    LabelsSection,
    ModelsSection,
    QualitySection,
    ReaderSection,
    SignalSection,
    SiteFile,
    SplitsSection,
    WindowSection,
    write_site_file,
)
from simulations.config import DataConfig, SimulationConfig
from simulations.partitions import Hospital
from simulations.progress import Progress
from simulations.source import PatientData, Source, cache_root

SITES, MODELS = "sites", "models"

MODEL_FOLDERS = ("old_encoder", "new_encoder", "task_head")


def write_sites(
    source: Source,
    dealt: Sequence[Hospital],
    config: SimulationConfig,
    folder: Path,
    *,
    copy: bool,
    standalone: bool,
    progress: Progress,
) -> None:
    """A folder `site-<i>` for each hospital below `folder/sites`.

    `standalone`: each may be carried to a machine of its own. Its recordings are copies, its cache is its own, its port
    is another than its neighbours', and it has no models yet: they come with the study.
    """
    names = site_names(len(dealt))
    for i, hospital in enumerate(dealt):
        progress("site folders", i, len(dealt))
        place = folder / SITES / f"site-{i}"
        members = members_of(source, (*hospital.pair, *hospital.validation, *hospital.test))
        write_recordings(place / "recordings", members, copy=copy or standalone)
        if source.labels == "csv":
            write_labels(place / "labels.csv", members)
        (place / "policy.yaml").write_text(policy_text(config.policy, names[i]), encoding="utf-8")
        file = SiteFile(
            site=names[i],
            old=signal_section(source, "old"),
            new=signal_section(source, "new"),
            labels=labels_section(source, config.data),
            splits=SplitsSection(pair=hospital.pair, validation=hospital.validation, test=hospital.test),
            policy=Path("policy.yaml"),
            compute=config.compute,
            **(_own_places(config, i) if standalone else _shared_places(config)),
            **common_keys(source),
        )
        write_site_file(place / "site.yaml", file)
    progress("site folders", len(dealt), len(dealt))


def _shared_places(config: SimulationConfig) -> dict[str, Any]:
    cache = cache_root().absolute() / "features"
    return {
        "models": ModelsSection(**{name: Path("../..") / MODELS / name for name in MODEL_FOLDERS}),
        "cache": CacheSection(folder=cache, max_gigabytes=config.cache.max_gigabytes),
    }


def _own_places(config: SimulationConfig, number: int) -> dict[str, Any]:
    return {
        "models": ModelsSection(**{name: Path(MODELS) / name for name in MODEL_FOLDERS}),
        "cache": CacheSection(max_gigabytes=config.cache.max_gigabytes),
        "deployment": DeploymentSection(port=DeploymentSection().port + number),
    }


def site_names(count: int) -> tuple[str, ...]:
    """The agreed names of so many hospitals."""
    digits = len(str(count))
    return tuple(f"hospital-{i + 1:0{digits}d}" for i in range(count))


def policy_text(policy: Policy, site: str) -> str:
    """The policy file that ships, every key explained, with this policy's values in place of the defaults."""
    values = policy.model_dump(mode="json") | {"site": site}
    defaults = Policy().model_dump(mode="json")
    text = policy_template(site).replace(
        "Without this file, the strictest defaults hold, which are the values written here.",
        "Without this file, the strictest defaults hold. Written by `fedbridge-sim prepare`.",
    )
    lines = text.split("\n")
    for key, value in values.items():
        if key != "site" and value != defaults[key]:
            lines = _replaced(lines, key, value)
    return "\n".join(lines)


def _replaced(lines: list[str], key: str, value: object) -> list[str]:
    """The lines with one top-level key's block exchanged; the comments above it stay."""
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
    end = start + 1
    while end < len(lines) and lines[end][:1] in (" ", "-"):
        end += 1
    block = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).rstrip("\n").split("\n")
    return [*lines[:start], *block, *lines[end:]]


def common_keys(source: Source) -> dict[str, Any]:
    """What the site files of all hospitals of a source have in common."""
    return {
        "reader": ReaderSection(name=source.reader, options=source.reader_options),
        "folder": Path("recordings"),
        "window": WindowSection(seconds=source.window_seconds, step_seconds=source.step_seconds),
        "quality": QualitySection.model_validate(source.quality),
    }


def signal_section(source: Source, role: str) -> SignalSection:
    """One modality as the source's recordings hold it; `role` is old or new."""
    signal = source.old if role == "old" else source.new
    return SignalSection(modality=signal.modality, channels=signal.channels, rate_hz=signal.rate_hz)


def labels_section(source: Source, data: DataConfig) -> LabelsSection:
    """Where the labels of a site folder are."""
    return LabelsSection(
        source=source.labels,
        path=Path("labels.csv") if source.labels == "csv" else None,
        classes=source.classes,
        coverage=source.coverage,
        unlabelled=data.unlabelled,
    )


def members_of(source: Source, names: Sequence[str]) -> list[PatientData]:
    """The patients of these names, in the source\'s order."""
    wanted = set(names)
    return [patient for patient in source.patients if patient.patient in wanted]


def write_recordings(folder: Path, members: Sequence[PatientData], *, copy: bool) -> None:
    """Link to the patients\' recordings, or copy them, in a new folder."""
    folder.mkdir(parents=True)
    for patient in members:
        for path in patient.files:
            place = folder / (path.name if patient.root is None else path.relative_to(patient.root))
            place.parent.mkdir(parents=True, exist_ok=True)
            if copy:
                shutil.copyfile(path, place)
            else:
                place.symlink_to(path.resolve())


def write_labels(path: Path, members: Sequence[PatientData]) -> None:
    """The patients\' labels as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["recording", "start_seconds", "end_seconds", "label", "group"])
        for patient in members:
            writer.writerows(
                (row.recording, row.start_seconds, row.end_seconds, row.label, row.group) for row in patient.labels
            )

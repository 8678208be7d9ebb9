"""Whole study files for small sites, as a coordinator would send them, and sites that have not accepted any yet."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from flwr.cli.build import build_fab_from_disk

from bridge.bundle import installed_bundle
from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.job import Job, job_text
from bridge.study.archive import members_of, write_study
from bridge.study.manifest import JOB_YAML, MODEL_NAMES, MODELS, PAGE, Code, Manifest, ModelEntry, study_id
from bridge.study.page import study_page
from client.site import Site, open_site
from tests.client.agreements import SECRET, write_coordinator
from tests.client.sites import PERMISSIVE, build_job, build_site

PAGE_TEXT = "## What leaves your site"
"""A line of every study's page."""


def own_code() -> Code:
    """The code that this installation makes, now."""
    bundle = installed_bundle(build_fab_from_disk)
    return Code(sha256=bundle.sha256, files=bundle.files)


def study_file(
    path: Path,
    models: Path,
    job: Job | None = None,
    *,
    include: bool = True,
    code: Code | None = None,
    secret: bytes = SECRET,
    versions: Mapping[str, str] | None = None,
    attempts: int = 2,
    created: str = "2026-01-01T00:00:00+00:00",
    changes: Mapping[str, Any] | None = None,
    page: str = "",
) -> str:
    """Write a signed study of a job about these models; returns its id. `changes` replaces keys of the manifest,
    `page` the page that follows from it."""
    job = build_job(models, coordinator="lab") if job is None else job
    files: dict[str, bytes | Path] = {JOB_YAML: job_text(job).encode()}
    entries = {}
    for name in MODEL_NAMES:
        folder = models / name
        card = read_card(folder, HeadCard) if name == "task_head" else read_card(folder, EncoderCard)
        entries[name] = ModelEntry(
            digest=card.digest, weights_sha256=card.weights_sha256, included=include, source="the lab's archive"
        )
        parts = ("card.json", "weights.safetensors") if include else ("card.json",)
        files |= {f"{MODELS}/{name}/{part}": models / name / part for part in parts}
    manifest = Manifest(
        name=job.name,
        coordinator=job.coordinator,
        created=created,
        attempts=attempts,
        code=own_code() if code is None else code,
        versions=dict(versions or {}),
        models=entries,
        members={},
    ).model_copy(update=dict(changes or {}))
    cards = (
        read_card(models / "old_encoder", EncoderCard),
        read_card(models / "new_encoder", EncoderCard),
        read_card(models / "task_head", HeadCard),
    )
    files[PAGE] = (page or study_page(manifest, job, cards)).encode()
    if "members" not in (changes or {}):
        manifest = manifest.model_copy(update={"members": members_of(files)})
    return study_id(manifest.name, write_study(path, manifest, files, secret))


def fresh_site(
    folder: Path, models: Path, *, own_models: bool = True, policy: Mapping[str, Any] = PERMISSIVE, **changes: Any
) -> Site:
    """A site enrolled with the coordinator `lab` in a folder of its own, with the models or without any."""
    if own_models:
        shutil.copytree(models, folder / "models")
    places = {"models": {name: f"models/{name}" for name in MODEL_NAMES}}
    build_site(folder, "alpha", models=models, policy=policy, changes={**places, **changes})
    site = open_site(folder)
    write_coordinator(site, "lab")
    return site


def change_site(site: Site, **changes: Any) -> Site:
    """The site with other keys in its file."""
    plain = yaml.safe_load(site.path.read_text())
    site.path.write_text(yaml.safe_dump({**plain, **changes}))
    return open_site(site.path)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder below a place with a hash of its content: nothing was written where two are equal."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }

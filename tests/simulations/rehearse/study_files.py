"""Study files of prepared simulations, and what a folder holds."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import yaml

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.job import Job, parse_job
from bridge.study.archive import members_of, write_study
from bridge.study.manifest import JOB_YAML, MODEL_NAMES, PAGE, Code, Manifest, ModelEntry
from client.site import open_site
from tests.client.agreements import SECRET, write_coordinator


def study_of(prepared: Path, path: Path, *, job_text: str | None = None, included: bool = True) -> Path:
    """A study file with the models of a prepared folder, for its job or for another job text."""
    text = job_text or (prepared / JOB_YAML).read_text()
    job: Job = parse_job(text)
    models: dict[str, ModelEntry] = {}
    everything: dict[str, bytes | Path] = {JOB_YAML: text.encode(), PAGE: b"# A study\n"}
    for name in MODEL_NAMES:
        folder = prepared / "models" / name
        card = read_card(folder, HeadCard) if name == "task_head" else read_card(folder, EncoderCard)
        models[name] = ModelEntry(digest=card.digest, weights_sha256=card.weights_sha256, included=included)
        everything[f"models/{name}/card.json"] = folder / "card.json"
        if included:
            everything[f"models/{name}/weights.safetensors"] = folder / "weights.safetensors"
    if included:
        everything["models/public_vectors.safetensors"] = prepared / "models" / "public_vectors.safetensors"
    manifest = Manifest(
        name=job.name,
        coordinator=job.coordinator,
        created="2030-01-01T00:00:00+00:00",
        attempts=5,
        code=installed_code(),
        versions={},
        models=models,
        members=members_of(everything),
    )
    write_study(path, manifest, everything, SECRET)
    return path


def hospital(prepared: Path, place: Path, number: int = 0) -> Path:
    """A copy of a prepared site with own recordings and cache, whose coordinator signs as `study_of` does; its models
    are those of the prepared folder."""
    shutil.copytree(prepared / "sites" / f"site-{number}", place)
    file = yaml.safe_load((place / "site.yaml").read_text())
    file["models"] = {name: str(prepared / "models" / name) for name in MODEL_NAMES}
    file["cache"] = {"folder": "cache"}
    (place / "site.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
    write_coordinator(open_site(place), "simulation")
    return place


def installed_code() -> Code:
    """The code that is installed here."""
    from flwr.cli.build import build_fab_from_disk

    from bridge.bundle import installed_bundle

    bundle = installed_bundle(build_fab_from_disk)
    return Code(sha256=bundle.sha256, files=dict(bundle.files))


def state_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder with its hash and its time of change."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

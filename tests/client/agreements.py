"""An accepted study for a test's site: signed, written as a study file, opened and put on record like any other.

What `fedbridge-site accept` compares before it asks is left out here (tests/client/study does that): a test may want
to see what a site answers whose policy or models have changed since.
"""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import yaml

from bridge.enrolment import CoordinatorFile
from bridge.job import Job, job_text, parse_job
from bridge.study.archive import members_of, open_study, write_study
from bridge.study.manifest import JOB_YAML, MODEL_NAMES, MODELS, PAGE, Code, Manifest, ModelEntry
from bridge.study.signing import public_of
from client.site import Site, open_site
from client.study.record import Accepted
from client.study.running import set_running_bundle
from client.study.write import record

SECRET = bytes(range(32))
BUNDLE = "c0de" * 16

_agreed: dict[tuple[Path, str], Path] = {}


def agree(site: Site, job: Job, *, attempts: int = 10_000, bundle: str = BUNDLE, text: str | None = None) -> Accepted:
    """Put an acceptance of this job on record, and run as its code. `text` is the job's, where not the usual one."""
    write_coordinator(site, job.coordinator)
    text = job_text(job) if text is None else text
    files: dict[str, bytes | Path] = {JOB_YAML: text.encode(), PAGE: b"# A test's study\n"}
    files |= {f"{MODELS}/{name}/card.json": b"{}" for name in MODEL_NAMES}
    manifest = Manifest(
        name=job.name,
        coordinator=job.coordinator,
        created="2026-01-01T00:00:00+00:00",
        attempts=attempts,
        code=Code(sha256=bundle, files={}),
        versions={},
        models={
            name: ModelEntry(digest=getattr(job.models, name), weights_sha256="0" * 64, included=False)
            for name in MODEL_NAMES
        },
        members=members_of(files),
    )
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "study.zip"
        write_study(path, manifest, files, SECRET)
        with open_study(path) as study:
            study.require_signed_by(public_of(SECRET), "the tests")
            found = record(site, study, "a test")
    set_running_bundle(bundle)
    return found


def agree_once(path: Path, text: str) -> None:
    """As `agree`, unless the site has accepted this very text of a job already."""
    key = (path.absolute(), text)
    if key in _agreed and _agreed[key].is_dir():
        set_running_bundle(BUNDLE)
        return
    _agreed[key] = agree(open_site(path), parse_job(text), text=text).folder


def write_coordinator(site: Site, name: str, secret: bytes = SECRET) -> None:
    """The coordinator's file beside the site file."""
    key = base64.b64encode(public_of(secret)).decode()
    file = CoordinatorFile(name=name, address="localhost:8443", signing_key=key, ca_certificate="none")
    text = yaml.safe_dump(file.model_dump(mode="json", by_alias=True))
    site.coordinator_path.write_text(text, encoding="utf-8")

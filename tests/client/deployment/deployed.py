"""Site folders with keys and acceptances, as `init` and `accept` make them, for tests of what runs there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from bridge.study.manifest import Code, Manifest, Member, study_id
from bridge.study.signing import sign
from client.audit import AuditLog, Entry
from client.deployment.keys import new_executor_secret, new_node_key, read_node_key, write_public
from client.site import Site, open_site
from client.study.record import Acceptance, purpose_of

PLAIN_SITE: dict[str, Any] = {
    "schema": "fedbridge.site/1",
    "site": "north",
    "folder": "recordings",
    "old": {"modality": "ECG", "channels": ["II"], "rate_hz": 125},
    "new": {"modality": "PPG", "channels": ["PLETH"], "rate_hz": 125},
    "window": {"seconds": 10, "step_seconds": 10},
}


def plain_site(folder: Path, port: int, **changes: Any) -> Site:
    """A site without recordings or models, with keys; `port` is its own."""
    (folder / "keys").mkdir(parents=True, mode=0o700)
    new_node_key(folder / "keys")
    write_public(folder / "keys", read_node_key(folder / "keys"))
    new_executor_secret(folder / "keys")
    content = {**PLAIN_SITE, "deployment": {"port": port}, **changes}
    (folder / "site.yaml").write_text(yaml.safe_dump(content))
    return open_site(folder)


def accept_code(site: Site, secret: bytes, bundle: str, name: str = "small") -> None:
    """Record that the site accepted a study with this code, signed by `secret`."""
    job, page = b"name: small\n", b"what is asked\n"
    members = {
        path: Member(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        for path, content in (("job.yaml", job), ("page.md", page))
    }
    manifest = Manifest(
        name=name,
        coordinator="fedbridge",
        created="2025-01-01T00:00:00+00:00",
        attempts=5,
        code=Code(sha256=bundle, files={}),
        versions={},
        models={},
        members=members,
    )
    content = manifest.canonical()
    sha256 = hashlib.sha256(content).hexdigest()
    acceptance = Acceptance(study_sha256=sha256, bundle_sha256=bundle, who="a test", when="2025-01-02T00:00:00+00:00")
    folder = site.studies_folder / study_id(name, sha256)
    folder.mkdir(parents=True)
    files = {
        "study.json": content,
        "study.sig": sign(secret, content),
        "job.yaml": job,
        "page.md": page,
        "acceptance.json": acceptance.content(),
    }
    for path, text in files.items():
        (folder / path).write_bytes(text)
    entry = Entry(run=folder.name, message="accept", event="accepted", sha256=sha256, purpose=purpose_of(acceptance))
    AuditLog(site.audit_path).append([entry])

"""A tiny study for tests: cards of no real network, weights that are a few bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.encoders.cards import EncoderCard, HeadCard, seal
from bridge.job import Job, Models, job_text
from bridge.study.archive import members_of, write_study
from bridge.study.manifest import Code, Manifest, ModelEntry
from bridge.study.signing import new_key, public_of
from bridge.windows import Preprocessing, WindowSpec

OLD_WEIGHTS, NEW_WEIGHTS, HEAD_WEIGHTS = b"old" * 1000, b"new" * 700, b"head" * 9


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def encoder_card(modality: Any, weights: bytes, positions: int = 3, tokens: int = 5, width: int = 4) -> EncoderCard:
    layouts = ((tokens, width),) * positions
    return seal(
        EncoderCard(
            family="compact",
            window=WindowSpec(modality=modality, channels=(modality,), rate_hz=50, samples=500),
            preprocessing=Preprocessing(),
            layouts_in=layouts,
            layouts_out=layouts,
            parameters=100,
            weights_sha256=sha256(weights),
        )
    )


def cards() -> tuple[EncoderCard, EncoderCard, HeadCard]:
    old = encoder_card("ECG", OLD_WEIGHTS)
    head = seal(HeadCard(classes=("a", "b", "c"), width=4, old_encoder=old.digest, weights_sha256=sha256(HEAD_WEIGHTS)))
    return old, encoder_card("PPG", NEW_WEIGHTS, positions=4, width=6), head


def job(**sections: Any) -> Job:
    old, new, head = cards()
    models = Models(old_encoder=old.digest, new_encoder=new.digest, task_head=head.digest)
    return Job.model_validate({"name": "tiny", "coordinator": "lead", "models": models, **sections})


@dataclass
class Parts:
    """What a study is written of; change anything before `write`."""

    files: dict[str, bytes | Path]
    manifest: Manifest
    secret: bytes

    @property
    def public(self) -> bytes:
        return public_of(self.secret)

    def relist(self) -> None:
        """Let the manifest list the files as they are."""
        self.manifest = self.manifest.model_copy(update={"members": members_of(self.files)})

    def write(self, path: Path) -> Path:
        write_study(path, self.manifest, self.files, self.secret)
        return path


def parts(included: bool = True, secret: bytes | None = None, **sections: Any) -> Parts:
    weights = {"old_encoder": OLD_WEIGHTS, "new_encoder": NEW_WEIGHTS, "task_head": HEAD_WEIGHTS}
    files: dict[str, bytes | Path] = {"page.md": b"# Tiny\n", "job.yaml": job_text(job(**sections)).encode()}
    models = {}
    for (name, content), card in zip(weights.items(), cards(), strict=True):
        files[f"models/{name}/card.json"] = json.dumps(card.model_dump(mode="json", by_alias=True)).encode()
        if included:
            files[f"models/{name}/weights.safetensors"] = content
        models[name] = ModelEntry(digest=card.digest, weights_sha256=sha256(content), included=included, source="")
    if included:
        files["models/public_vectors.safetensors"] = b"public"
    manifest = Manifest(
        name="tiny",
        coordinator="lead",
        created="2026-01-01T00:00:00Z",
        attempts=5,
        code=Code(sha256="0" * 64, files={}),
        versions={"fedbridge": "0"},
        models=models,
        members=members_of(files),
    )
    return Parts(files, manifest, secret or new_key())

"""From a configuration to a signed study file, and the commands around it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.cli.build import build_fab_from_disk

from bridge.bundle import installed_bundle
from bridge.console import run_app
from bridge.enrolment import CoordinatorFile
from bridge.errors import ConfigError, EnrolmentError, PositionError, StudyError, StudyStorageError, WeightsError
from bridge.job import Job, job_text, parse_job
from bridge.privacy.accounting import epsilon, releases_of
from bridge.study.archive import members_of, open_study, write_study
from bridge.study.manifest import MODEL_NAMES
from bridge.study.page import require_own_page
from bridge.study.signing import new_key, public_of
from server.cli import app
from server.coordinator.folder import CoordinatorFolder
from server.study_file import BuiltStudy, StudyConfig, build_study
from tests.conftest import ROOT
from tests.server.conftest import Models

SMALL: dict[str, Any] = {
    "name": "pulse",
    "purpose": "Try it.",
    "contact": "Ada, 555-0100",
    "selection": {"folds": 3},
    "bridge": {"rank": 3, "prototypes": 4},
    "train": {"rounds": 5, "local_steps": 2},
    "sites": {"expected": ["north", "south"]},
}
PRIVATE = {
    "mechanism": "local",
    "epsilon": 8.0,
    "delta": 1e-3,
    "patients_bound": 100,
    "selection": {"epsilon": 1.0},
    "metrics": {"epsilon": 4.0},
}


@dataclass
class Desk:
    """A coordinator's folder with a key, and the models beside it."""

    folder: Path
    models: Path

    @property
    def coordinator(self) -> CoordinatorFile:
        return CoordinatorFolder.open(self.folder).coordinator()

    @property
    def secret(self) -> bytes:
        return CoordinatorFolder.open(self.folder).signing_secret()

    def config(self, **changes: Any) -> Path:
        path = self.folder / "study.yaml"
        content = {**SMALL, "models": {"folder": str(self.models)}, **changes}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def build(self, **changes: Any) -> BuiltStudy:
        return build_study(self.config(**changes), self.coordinator, self.secret, self.folder / "study.zip")

    def call(self, *arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            run_app(app, ["study", *arguments])
        return int(ended.value.code or 0)


def write_coordinator(folder: Path, secret: bytes) -> None:
    """As much of a coordinator's folder as signing needs."""
    write_key(folder, secret)
    public = base64.b64encode(public_of(secret)).decode()
    content = {"name": "lead", "address": "localhost:8443", "signing_key": public, "ca_certificate": "PEM"}
    (folder / "coordinator.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (folder / "server.yaml").write_text("name: lead\nhost: localhost\n", encoding="utf-8")


def write_key(folder: Path, secret: bytes) -> None:
    key = folder / "keys" / "signing.key"
    key.parent.mkdir(parents=True, exist_ok=True)
    key.write_text(base64.b64encode(secret).decode() + "\n", encoding="ascii")
    key.chmod(0o600)


@pytest.fixture
def desk(tmp_path: Path, models: Models) -> Desk:
    write_coordinator(tmp_path / "desk", new_key())
    return Desk(tmp_path / "desk", models.folder)


@pytest.fixture(scope="session")
def bundle() -> Any:
    return installed_bundle(build_fab_from_disk)


def test_a_study_holds_what_its_configuration_asks(desk: Desk, models: Models, bundle: Any) -> None:
    built = desk.build()
    with open_study(built.path) as study:
        assert (study.id, study.sha256, study.manifest) == (built.id, built.sha256, built.manifest)
        assert study.is_signed_by(desk.coordinator.verify_key)
        study.check()
        require_own_page(study)
        job = {name: value for name, value in SMALL.items() if name not in ("purpose", "contact")}
        wanted = Job.model_validate({**job, "coordinator": "lead", "models": models.digests})
        assert study.job == wanted
        assert study.job_text == job_text(wanted)
        manifest = study.manifest
        assert (manifest.name, manifest.coordinator, manifest.attempts) == ("pulse", "lead", 5)
        assert (manifest.purpose, manifest.contact) == ("Try it.", "Ada, 555-0100")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", manifest.created)
        assert manifest.code.sha256 == bundle.sha256
        assert manifest.code.files == bundle.files
        assert {"fedbridge", "flwr", "python", "torch"} <= manifest.versions.keys()
        assert {name: entry.digest for name, entry in manifest.models.items()} == models.digests
        study.extract_models(desk.folder / "models")
    original = {str(p.relative_to(models.folder)): p.read_bytes() for p in models.folder.rglob("*") if p.is_file()}
    copied = {
        str(p.relative_to(desk.folder / "models")): p.read_bytes()
        for p in (desk.folder / "models").rglob("*")
        if p.is_file()
    }
    assert copied == original
    assert "public_vectors.safetensors" in original


def test_the_models_folder_is_relative_to_the_configuration(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "things").symlink_to(desk.models)
    assert desk.build(models={"folder": "../things"}).manifest.models["old_encoder"].included


def test_weights_may_be_named_instead_of_included(desk: Desk) -> None:
    built = desk.build(models={"folder": str(desk.models), "include": False, "source": "https://example.org/m"})
    assert set(built.manifest.members) == {
        "job.yaml",
        "page.md",
        *(f"models/{name}/card.json" for name in MODEL_NAMES),
    }
    for name, entry in built.manifest.models.items():
        weights = desk.models / name / "weights.safetensors"
        assert entry.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert (entry.included, entry.source) == (False, "https://example.org/m")
    with open_study(built.path) as study:
        study.check()
        assert "not included; from: https://example.org/m" in study.page


def test_a_private_plan_is_resolved(desk: Desk) -> None:
    with open_study(desk.build(privacy=PRIVATE).path) as study:
        job = study.job
        require_own_page(study)
        page = study.page
    assert job.privacy.training.noise_multiplier
    assert job.privacy.selection.noise_multiplier
    spent = epsilon(releases_of(job, "pair"), 1e-3)
    assert 7.9 < spent <= 8.0
    tested = epsilon(releases_of(job, "test"), 1e-3)
    assert 3.9 < tested <= 4.0
    rows = dict(re.findall(r"^\| (who .*?) \| ([\d.]+) \| 0.001 \|$", page, re.MULTILINE))
    assert rows.keys() == {"who give paired recordings", "who judge the result"}
    assert spent <= float(rows["who give paired recordings"]) < spent + 0.011
    assert tested <= float(rows["who judge the result"]) < tested + 0.011


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"nmae": "x"}, ConfigError, "did you mean 'name'"),
        ({"train": {"ronds": 3}}, ConfigError, "did you mean 'train.rounds'|did you mean 'rounds'"),
        ({"attempts": 0}, ConfigError, "attempts"),
        ({"attempts": 2, "sites": {"retries": 2}}, ConfigError, "attempts 2 must be more than sites.retries 2"),
        ({"name": "no spaces"}, ConfigError, "name"),
        ({"models": {"folder": "nowhere"}}, WeightsError, "no complete model folder"),
        ({"models": {"folder": "nowhere", "include": False}}, ConfigError, "must say where to get weights"),
        ({"privacy": {"simulation_seed": 1}}, ConfigError, "simulation_seed is for simulations alone"),
        ({"privacy": {"mechanism": "local"}}, ConfigError, "noise_multiplier"),
        ({"privacy": PRIVATE, "selection": {"mode": "moments"}}, ConfigError, "selection.mode 'moments'"),
        ({"train": "closed_form"}, ConfigError, "the closed form needs"),
        ({"purpose": "good\x1b[8mbad"}, StudyError, "not a sound study file"),
        ({"contact": "good\u202ebad"}, StudyError, "not a sound study file"),
        ({"sites": {"expected": [f"hospital-{i}" for i in range(6000)]}}, StudyError, "not a sound study file"),
    ],
)
def test_a_wrong_configuration_is_refused(
    desk: Desk, changes: dict[str, Any], kind: type[Exception], told: str
) -> None:
    with pytest.raises(kind, match=told):
        desk.build(**changes)
    assert not (desk.folder / "study.zip").exists()


def test_a_fixed_position_that_is_none_is_refused(desk: Desk) -> None:
    with pytest.raises(PositionError):
        desk.build(selection={"mode": "fixed", "input_position": 1, "output_position": 99})


@pytest.mark.parametrize("text", ["", "- 1\n", "name: [\n", "\udcff"])
def test_a_configuration_that_is_none_is_refused(desk: Desk, text: str) -> None:
    path = desk.folder / "study.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        build_study(path, desk.coordinator, desk.secret, desk.folder / "study.zip")
    with pytest.raises(ConfigError, match="can't be read"):
        build_study(desk.folder / "absent.yaml", desk.coordinator, desk.secret, desk.folder / "study.zip")


def test_changed_weights_are_refused(desk: Desk, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(desk.models, copy)
    weights = copy / "new_encoder" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(WeightsError, match="not the weights that the card describes"):
        desk.build(models={"folder": str(copy)})


def test_public_vectors_that_are_needed_and_missing_are_refused(desk: Desk, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(desk.models, copy)
    (copy / "public_vectors.safetensors").unlink()
    desk.build(models={"folder": str(copy)})
    (desk.folder / "study.zip").unlink()
    with pytest.raises(WeightsError, match=r"public_vectors\.safetensors: no such file"):
        desk.build(models={"folder": str(copy)}, bridge={"initialisation": "directions", "prototypes": 4})


def test_nothing_is_written_over_unasked(desk: Desk) -> None:
    first = desk.build().path.read_bytes()
    with pytest.raises(StudyError, match="there already") as caught:
        desk.build(attempts=7)
    assert "--force" in caught.value.fix
    assert (desk.folder / "study.zip").read_bytes() == first
    built = build_study(desk.config(attempts=7), desk.coordinator, desk.secret, desk.folder / "study.zip", force=True)
    with open_study(built.path) as study:
        assert study.manifest.attempts == 7


def test_a_place_that_can_t_be_written_leaves_nothing(desk: Desk) -> None:
    with pytest.raises(StudyStorageError):
        build_study(desk.config(), desk.coordinator, desk.secret, desk.folder / "absent" / "study.zip")


def test_another_s_key_is_refused(desk: Desk) -> None:
    with pytest.raises(EnrolmentError, match="not the coordinator's"):
        build_study(desk.config(), desk.coordinator, new_key(), desk.folder / "study.zip")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda folder: (folder / "keys" / "signing.key").unlink(), 5),
        (lambda folder: (folder / "keys" / "signing.key").write_text("?"), 5),
        (lambda folder: (folder / "keys" / "signing.key").chmod(0o640), 5),
        (lambda folder: write_key(folder, new_key()), 5),
        (lambda folder: (folder / "coordinator.yaml").unlink(), 2),
        (lambda folder: (folder / "server.yaml").unlink(), 2),
    ],
)
def test_without_a_sound_folder_nothing_is_built(desk: Desk, change: Callable[[Path], object], code: int) -> None:
    out = desk.folder / "study.zip"
    config = desk.config()
    change(desk.folder)
    assert desk.call("build", str(config), "--out", str(out), "--dir", str(desk.folder)) == code
    assert not out.exists()


def test_the_commands_build_show_and_verify(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    out = desk.folder / "handed" / "pulse.zip"
    out.parent.mkdir()
    place = ("--dir", str(desk.folder))
    assert desk.call("build", str(desk.config()), "--out", str(out), *place) == 0
    printed = capsys.readouterr().out
    with open_study(out) as study:
        assert f"study {study.id}, {out.stat().st_size:,} bytes" in printed
        assert study.sha256 in printed
    assert desk.call("build", str(desk.config()), "--out", str(out), *place) == 5
    assert "there already" in capsys.readouterr().err
    assert desk.call("build", str(desk.config()), "--out", str(out), "--force", *place) == 0
    capsys.readouterr()
    with open_study(out) as study:
        page = study.page
    assert page.startswith("# What the study 'pulse' asks of your site\n")

    assert desk.call("show", str(out)) == 0
    printed = capsys.readouterr().out
    assert "signed by    not checked" in printed
    assert desk.call("show", str(out), *place) == 0
    printed = capsys.readouterr().out
    assert "signed by    'lead', by the key in" in printed
    assert printed.endswith("\n\n" + page)

    assert desk.call("verify", str(out), *place) == 0
    assert "is signed by 'lead' and whole (9 files)" in capsys.readouterr().out
    assert desk.call("verify", str(out), "--coordinator", str(desk.folder / "coordinator.yaml")) == 0


def test_verify_ends_with_5_where_anything_is_wrong(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = desk.build()
    place = ("--dir", str(desk.folder))

    def refused(path: Path, told: str, *where: str) -> None:
        assert desk.call("verify", str(path), *(where or place)) == 5
        assert told in capsys.readouterr().err

    other = tmp_path / "other"
    write_coordinator(other, new_key())
    refused(built.path, "not signed by the coordinator 'lead'", "--dir", str(other))
    assert desk.call("show", str(built.path), "--dir", str(other)) == 0
    assert "NOT 'lead'" in capsys.readouterr().out

    refused(tmp_path / "absent.zip", "can't be read")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(built.path.read_bytes()[:-100])
    refused(cut, "not a sound study file")
    weights = (desk.models / "new_encoder" / "weights.safetensors").read_bytes()
    changed = tmp_path / "changed.zip"
    content = built.path.read_bytes()
    at = content.index(weights) + len(weights) - 1
    changed.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    refused(changed, "models/new_encoder/weights.safetensors is damaged")


def test_a_page_that_tells_something_else_is_refused(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Signed, whole, and lying."""
    built = desk.build()
    with zipfile.ZipFile(built.path) as archive:
        files: dict[str, bytes | Path] = {name: archive.read(name) for name in built.manifest.members}
    page = files["page.md"]
    assert isinstance(page, bytes)
    files["page.md"] = page.replace(b"**None.**", b"**Best.**")
    assert files["page.md"] != page
    manifest = built.manifest.model_copy(update={"members": members_of(files)})
    write_study(built.path, manifest, files, desk.secret)
    assert desk.call("verify", str(built.path), "--dir", str(desk.folder)) == 5
    assert "page.md does not tell what the study asks" in capsys.readouterr().err
    code = manifest.code.model_copy(update={"sha256": "0" * 64})
    write_study(built.path, manifest.model_copy(update={"code": code}), files, desk.secret)
    assert desk.call("verify", str(built.path), "--dir", str(desk.folder)) == 0
    assert "Its code is not that of this installation" in capsys.readouterr().out


def test_a_missing_coordinator_file_is_a_configuration_error(desk: Desk, tmp_path: Path) -> None:
    built = desk.build()
    assert desk.call("verify", str(built.path), "--dir", str(tmp_path)) == 2
    assert desk.call("build", str(desk.config()), "--out", str(tmp_path / "s.zip"), "--dir", str(tmp_path)) == 2


def keys(value: Any, path: str = "") -> set[str]:
    if not isinstance(value, dict) or not value:
        return {path}
    return {found for key, inner in value.items() for found in keys(inner, f"{path}.{key}" if path else key)}


def test_the_shipped_study_explains_every_key_there_is(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "configs" / "study.yaml").read_text(encoding="utf-8"))
    assert keys(StudyConfig.model_validate(content).model_dump(mode="json", by_alias=True)) == keys(content)
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8"))
    for section in ("selection", "bridge", "alignment", "train", "strategy", "evaluate", "privacy"):
        assert content[section] == demo[section], section
    assert content["models"]["folder"] == "../runs/demo/models"


# What docs/reference/study.md tells a hospital to run, without this package.


def shell_blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_documented_checks_by_hand_work(desk: Desk, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "reference" / "study.md").read_text(encoding="utf-8")
    (openssl,) = [block for block in shell_blocks(text) if "pkeyutl" in block]
    (script,) = [block for block in python_blocks(text) if "hashlib" in block]
    place = tmp_path / "hand"
    place.mkdir()
    (place / "study.zip").write_bytes(desk.build().path.read_bytes())
    (place / "coordinator.yaml").write_bytes((desk.folder / "coordinator.yaml").read_bytes())
    (place / "check.py").write_text(script, encoding="utf-8")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=60)

    good = run("sh", "-e", "-c", openssl)
    assert (good.returncode, "Signature Verified Successfully" in good.stdout) == (0, True), good.stderr
    checked = run("python3", "check.py")
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, "all files are as listed"), checked.stderr
    content = json.loads((place / "study" / "study.json").read_text())
    content["attempts"] = 6
    (place / "study" / "study.json").write_text(json.dumps(content))
    verify = openssl[openssl.index("openssl pkeyutl") :]
    assert run("sh", "-e", "-c", verify).returncode != 0
    (place / "study" / "job.yaml").write_text("rounds: 1000\n")
    changed = run("python3", "check.py")
    assert changed.returncode != 0
    assert "job.yaml" in changed.stderr


def test_the_job_of_a_study_is_what_a_site_parses(desk: Desk) -> None:
    with open_study(desk.build().path) as study:
        assert parse_job(study.job_text) == study.job

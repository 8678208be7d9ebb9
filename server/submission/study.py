"""May this study run here? Its signature, its code and its models, checked before anything is submitted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from bridge.bundle import BundleHash, installed_bundle
from bridge.encoders.cards import WEIGHTS
from bridge.errors import CodeError, StudyError, WeightsError
from bridge.files import cause, whole_file
from bridge.hashing import sha256_file
from bridge.study.archive import Study
from bridge.study.manifest import MODELS, STUDY_JSON, Code, ModelEntry
from server.coordinator.folder import CoordinatorFolder
from server.errors import RunFolderError
from server.initialisation import PUBLIC_VECTORS
from server.models import read_models

_NAMED = 5


def check_study(study: Study, folder: CoordinatorFolder) -> None:
    """Raise `StudyError` unless this coordinator signed the study, `CodeError` unless its code is the installed one."""
    study.require_signed_by(folder.coordinator().verify_key, f"this coordinator ({folder.settings.name})")
    if study.manifest.coordinator != folder.settings.name:
        raise StudyError(
            f"{study.path}: is a study of another coordinator",
            why=f"it names '{study.manifest.coordinator}', this folder is '{folder.settings.name}'",
            fix="name the coordinator's folder that built it with --dir",
        )
    from flwr.cli.build import build_fab_from_disk

    check_code(study.manifest.code, study.manifest.versions, build_fab_from_disk)


def check_code(code: Code, versions: Mapping[str, str], build: Callable[[Path], bytes]) -> None:
    """Raise `CodeError` that names what differs unless the installed packages make the study's bundle."""
    own = installed_bundle(build)
    if own.sha256 == code.sha256:
        return
    from server.book import versions as installed

    here = installed()
    others = [f"{name} {old} (here {here[name]})" for name, old in versions.items() if here.get(name, old) != old]
    raise CodeError(
        "the installed fedbridge is not the one that the study was built with",
        why=f"{_differing(code, own)}; other versions: {', '.join(others) or 'none'}",
        fix="install the study's version again, or build the study anew and let the sites accept it",
    )


def _differing(code: Code, own: BundleHash) -> str:
    changed = sorted(
        name for name in code.files.keys() | own.files.keys() if code.files.get(name) != own.files.get(name)
    )
    if not changed:
        return "the same files, bundled by another version of Flower"
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    return f"other content: {', '.join(changed[:_NAMED])}{more}"


def placed_models(study: Study, folder: CoordinatorFolder, weights: Path | None) -> Path:
    """The study's models in `studies/<id>/models`, complete and checked; put there where they are not yet.

    `weights` holds what the study file does not include: the weights of the model folders, the public vectors. Raises
    `WeightsError` where these are needed and missing or wrong, `StudyError` where the place holds something else or was
    changed, and what extraction raises.
    """
    place = folder.studies / study.id
    if not place.exists():
        _make(folder.studies)
        study.extract(place)
    elif not (place / STUDY_JSON).is_file() or (place / STUDY_JSON).read_bytes() != study.content:
        raise StudyError(f"{place}: does not hold this study", why="something else is there", fix="move it away")
    for name, model in study.manifest.models.items():
        if not model.included and not (place / MODELS / name / WEIGHTS).is_file():
            _copy_weights(name, model, weights, place / MODELS / name / WEIGHTS)
    if weights is not None and (weights / PUBLIC_VECTORS).is_file() and not (place / MODELS / PUBLIC_VECTORS).exists():
        _copy(weights / PUBLIC_VECTORS, place / MODELS / PUBLIC_VECTORS)
    for name, member in study.manifest.members.items():
        if not (place / name).is_file() or sha256_file(place / name) != member.sha256:
            raise StudyError(
                f"{place / name}: is not the study's", why="it was changed or removed", fix=f"remove {place}"
            )
    read_models(place / MODELS, study.job)
    return place / MODELS


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{folder}: can't be made", why=cause(error), fix="correct the permissions") from error


def _copy_weights(name: str, model: ModelEntry, weights: Path | None, target: Path) -> None:
    path = None if weights is None else weights / name / WEIGHTS
    if path is None or not path.is_file():
        raise WeightsError(
            f"the study does not include the weights of the {name}",
            why=f"{path} is missing" if path else f"get them from: {model.source or 'the study names no source'}",
            fix=f"--models DIR names a folder with {name}/{WEIGHTS}",
        )
    if sha256_file(path) != model.weights_sha256:
        raise WeightsError(
            f"{path}: not the weights of the study's {name}", why="its sha256 is another", fix="use the study's own"
        )
    _copy(path, target)


def _copy(source: Path, target: Path) -> None:
    try:
        with whole_file(target) as file, source.open("rb") as given:
            shutil.copyfileobj(given, file)
    except OSError as error:
        raise RunFolderError(f"{target}: can't be written", why=cause(error), fix="free space there") from error

"""What a coordinator refuses to run: another's study, other code, models that are not the study's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from flwr.cli.build import build_fab_from_disk

from bridge.errors import CodeError, StudyError, WeightsError
from bridge.study.archive import Study, open_study
from bridge.study.manifest import Code
from server.coordinator.folder import CoordinatorFolder, ServerFile
from server.coordinator.initialise import initialise
from server.submission.study import check_code, check_study, placed_models
from tests.server.submission.conftest import Built


def test_the_coordinators_own_study_may_run(study: Study, folder: CoordinatorFolder) -> None:
    check_study(study, folder)
    models = placed_models(study, folder, None)
    assert models == folder.path / "studies" / study.id / "models"
    assert (models / "old_encoder" / "weights.safetensors").is_file()
    before = sorted((path, path.stat().st_mtime_ns) for path in models.rglob("*"))
    assert placed_models(study, folder, None) == models
    assert sorted((path, path.stat().st_mtime_ns) for path in models.rglob("*")) == before


def test_a_study_signed_by_another_key_is_refused(study: Study, tmp_path: Path) -> None:
    other = initialise(tmp_path / "other", ServerFile(name="consortium", host="127.0.0.1")).folder
    with pytest.raises(StudyError, match=r"not signed by this coordinator \(consortium\)"):
        check_study(study, other)


def test_a_study_of_another_name_is_refused(study: Study, folder: CoordinatorFolder) -> None:
    content = yaml.safe_load((folder.path / "server.yaml").read_text())
    (folder.path / "server.yaml").write_text(yaml.safe_dump({**content, "name": "renamed"}))
    with pytest.raises(StudyError, match="of another coordinator") as caught:
        check_study(study, CoordinatorFolder.open(folder.path))
    assert caught.value.why == "it names 'consortium', this folder is 'renamed'"


def test_other_code_is_refused_and_told_file_by_file(study: Study) -> None:
    code = study.manifest.code
    check_code(code, study.manifest.versions, build_fab_from_disk)
    files = {**code.files, "client/app.py": "0" * 64, "server/extra.py": "1" * 64}
    del files["bridge/job.py"]
    with pytest.raises(CodeError, match="installed fedbridge is not the one") as caught:
        check_code(Code(sha256="0" * 64, files=files), {"flwr": "1.40.0", "fedbridge": "0.1.0"}, build_fab_from_disk)
    assert caught.value.why.startswith("other content: bridge/job.py, client/app.py, server/extra.py; other versions: ")
    assert "flwr 1.40.0 (here 1.41" in caught.value.why
    with pytest.raises(CodeError) as caught:
        check_code(Code(sha256="0" * 64, files=code.files), {}, build_fab_from_disk)
    assert caught.value.why == "the same files, bundled by another version of Flower; other versions: none"


def test_weights_that_are_not_included_are_asked_for_and_checked(built: Built, tmp_path: Path) -> None:
    path = built.build(
        tmp_path / "lean.zip", models={"folder": str(built.models.folder), "include": False, "source": "the shelf"}
    )
    given = tmp_path / "given"
    shutil.copytree(built.models.folder, given)
    shutil.copyfile(given / "old_encoder" / "weights.safetensors", given / "new_encoder" / "weights.safetensors")
    with open_study(path) as lean:
        with pytest.raises(WeightsError, match="does not include the weights of the new_encoder") as caught:
            placed_models(lean, built.folder, None)
        assert caught.value.why == "get them from: the shelf"
        with pytest.raises(WeightsError, match="does not include"):
            placed_models(lean, built.folder, tmp_path)
        with pytest.raises(WeightsError, match="not the weights of the study's new_encoder"):
            placed_models(lean, built.folder, given)
        models = placed_models(lean, built.folder, built.models.folder)
        assert (models / "public_vectors.safetensors").is_file()
        assert placed_models(lean, built.folder, None) == models


@pytest.mark.parametrize("name", ["models/task_head/weights.safetensors", "job.yaml", "models/old_encoder/card.json"])
def test_what_was_changed_in_the_place_is_found(study: Study, folder: CoordinatorFolder, name: str) -> None:
    placed_models(study, folder, None)
    path = folder.studies / study.id / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StudyError, match="is not the study's"):
        placed_models(study, folder, None)
    path.unlink()
    with pytest.raises(StudyError, match="is not the study's"):
        placed_models(study, folder, None)


def test_something_else_in_the_place_is_left_alone(study: Study, folder: CoordinatorFolder) -> None:
    place = folder.studies / study.id
    place.mkdir(parents=True)
    (place / "mine.txt").write_text("mine")
    with pytest.raises(StudyError, match="does not hold this study"):
        placed_models(study, folder, None)
    assert [path.name for path in place.iterdir()] == ["mine.txt"]

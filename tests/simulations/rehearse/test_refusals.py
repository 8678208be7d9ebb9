"""What stops a rehearsal before a message is computed; none of it leaves anything behind or changes the site."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from bridge.errors import FedbridgeError, StudyError
from bridge.messages import ReasonCode
from client.errors import NotAcceptedError, NoWindowsError, SiteFileError
from server.errors import RunFolderError
from simulations.errors import RehearsalError
from simulations.rehearse.run import rehearse
from tests.client.agreements import write_coordinator
from tests.simulations.rehearse.study_files import hospital, state_of, study_of


@pytest.fixture(scope="module")
def study(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_of(prepared, tmp_path_factory.mktemp("study") / "study.zip")


@pytest.fixture
def site(prepared: Path, tmp_path: Path) -> Path:
    return hospital(prepared, tmp_path / "hospital")


def refused(study: Path, site: Path, kind: type[FedbridgeError]) -> FedbridgeError:
    before, place = state_of(site), site.parent / "results"
    with pytest.raises(kind) as caught:
        rehearse(study, site, place / "out")
    assert state_of(site) == before
    assert list(place.glob("*")) == []
    assert list(place.glob(".*")) == []
    return caught.value


def not_accepted(study: Path, site: Path) -> NotAcceptedError:
    error = refused(study, site, NotAcceptedError)
    assert isinstance(error, NotAcceptedError)
    return error


def edit(path: Path, **changes: object) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def test_a_policy_that_forbids_an_item_or_the_mechanism_is_told_by_code(study: Path, site: Path) -> None:
    edit(site / "policy.yaml", items=["site", "can_take_part", "reason"])
    error = not_accepted(study, site)
    assert error.reason is ReasonCode.POLICY_FORBIDS
    assert "probe_scores" in error.why
    edit(site / "policy.yaml", privacy={"mechanisms": ["local"]})
    error = not_accepted(study, site)
    assert error.reason is ReasonCode.MECHANISM_FORBIDDEN
    assert "MECHANISM_FORBIDDEN" in error.what


def test_every_code_that_stands_in_the_way_is_told(prepared: Path, study: Path, site: Path) -> None:
    edit(site / "policy.yaml", max_rounds=1)
    other = site / "models" / "new_encoder"
    shutil.copytree(prepared / "models" / "old_encoder", other)
    names = yaml.safe_load((site / "site.yaml").read_text())["models"]
    edit(site / "site.yaml", models=names | {"new_encoder": "models/new_encoder"})
    error = not_accepted(study, site)
    assert "TOO_MANY_ROUNDS, WEIGHTS_DIFFER" in error.what


def test_weights_that_neither_the_study_nor_the_site_has(prepared: Path, tmp_path: Path, site: Path) -> None:
    edit(site / "site.yaml", models={name: f"models/{name}" for name in ("old_encoder", "new_encoder", "task_head")})
    error = not_accepted(study_of(prepared, tmp_path / "bare.zip", included=False), site)
    assert error.reason is ReasonCode.WEIGHTS_MISSING


def test_a_study_of_another_key_and_a_site_without_a_coordinator(study: Path, site: Path) -> None:
    from client.site import open_site

    write_coordinator(open_site(site), "simulation", bytes(32))
    assert "not signed by the coordinator 'simulation'" in refused(study, site, StudyError).what
    (site / "coordinator.yaml").unlink()
    assert not_accepted(study, site).reason is ReasonCode.STUDY_UNUSABLE


def test_a_study_that_does_not_expect_the_site(study: Path, site: Path) -> None:
    edit(site / "site.yaml", site="elsewhere")
    edit(site / "policy.yaml", site="elsewhere")
    assert "does not expect" in refused(study, site, RehearsalError).what


def test_a_study_file_that_is_none(study: Path, site: Path, tmp_path: Path) -> None:
    assert "can't be read" in refused(tmp_path / "absent.zip", site, StudyError).what
    torn = tmp_path / "torn.zip"
    torn.write_bytes(study.read_bytes()[:-100])
    refused(torn, site, StudyError)
    with study.open("rb") as file:
        content = bytearray(file.read())
    content[len(content) // 2] ^= 1
    torn.write_bytes(content)
    refused(torn, site, StudyError)


def test_a_site_that_is_none(study: Path, tmp_path: Path) -> None:
    with pytest.raises(SiteFileError):
        rehearse(study, tmp_path / "nowhere", tmp_path / "out")


def test_a_site_without_recordings(study: Path, site: Path) -> None:
    shutil.rmtree(site / "recordings")
    (site / "recordings").mkdir()
    assert "no recordings" in refused(study, site, NoWindowsError).what


def test_out_is_never_replaced(study: Path, site: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="is not an empty folder"):
        rehearse(study, site, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"

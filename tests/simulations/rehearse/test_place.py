from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.errors import RunFolderError
from simulations.rehearse.place import workplace

HOLD = """
import sys, time
from pathlib import Path
from simulations.rehearse.place import workplace
with workplace(Path(sys.argv[1])) as place:
    (place / "secret").write_text("a patient's")
    print(place, flush=True)
    time.sleep(60)
"""


def holding(out: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def gone(path: Path, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return not path.exists()


def test_out_is_there_whole_when_the_block_ends_well_and_nothing_else(tmp_path: Path) -> None:
    with workplace(tmp_path / "new" / "out") as place:
        assert place.stat().st_mode & 0o777 == 0o700
        (place / "out" / "found").write_text("it")
        (place / "work").mkdir()
        assert not (tmp_path / "new" / "out").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new" / "out" / "found").read_text() == "it"
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o700


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with workplace(tmp_path / "out") as place:
        (place / "out" / "found").touch()
    assert (tmp_path / "out" / "found").exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with workplace(tmp_path / "out") as place:
            (place / "out" / "half").touch()
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_there_is_never_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    kept = out / "mine" if kind == "folder" else out
    kept.write_text("mine")
    with pytest.raises(RunFolderError, match="is not an empty folder"), workplace(out):
        pass
    assert kept.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="can't be written"), workplace(tmp_path / "file" / "out"):
        pass


def test_two_at_once_do_not_share_a_place(tmp_path: Path) -> None:
    process, place = holding(tmp_path / "out")
    try:
        with pytest.raises(RunFolderError, match="another rehearsal makes it"), workplace(tmp_path / "out"):
            pass
        assert (place / "secret").exists()
        with workplace(tmp_path / "other"):
            assert (place / "secret").exists()
    finally:
        process.kill()
        process.wait()
    assert gone(place)


def test_a_killed_rehearsal_is_cleaned_up_after(tmp_path: Path) -> None:
    process, place = holding(tmp_path / "out")
    assert (place / "secret").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(place)
    assert not (tmp_path / "out").exists()


def test_the_next_rehearsal_removes_what_was_left_when_nobody_could_clean_up(tmp_path: Path) -> None:
    left = tmp_path / ".earlier.rehearsing"
    left.mkdir(mode=0o700)
    (left / "secret").write_text("a patient's")
    with workplace(tmp_path / "out"):
        assert not left.exists()


def test_a_link_of_that_name_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").touch()
    (tmp_path / ".x.rehearsing").symlink_to(precious)
    with workplace(tmp_path / "out"):
        pass
    assert (precious / "kept").exists()

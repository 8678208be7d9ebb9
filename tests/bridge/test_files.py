from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.files import whole_file, whole_folder, write_whole

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def stop_half_way(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_written_and_replaced(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "größer", sync=sync)
    assert path.read_bytes() == "größer".encode()
    write_whole(path, b"\x00\xff", sync=sync)
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["run.json"]


def test_what_fails_half_way_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_whole(path, "old")
    with pytest.raises(RuntimeError, match="in the middle"):
        stop_half_way(path)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["run.json"]


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "text")
    assert names(tmp_path) == ["folder"]


_WRITER = """
import sys
from pathlib import Path
from bridge.files import write_whole
n = 0
while True:
    n += 1
    write_whole(Path(sys.argv[1]), str(n % 10) * 200_000)
"""


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.11])
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], cwd=ROOT)
    try:
        while not path.exists():
            time.sleep(0.005)
        time.sleep(delay)
    finally:
        process.kill()
        process.wait()
    text = path.read_text()
    assert len(text) == 200_000
    assert len(set(text)) == 1


def stop_half_way_in(folder: Path) -> None:
    with whole_folder(folder) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError("in the middle")


def test_a_folder_has_its_name_when_the_block_ended_well_and_is_gone_otherwise(tmp_path: Path) -> None:
    place = tmp_path / "above" / "folder"
    with pytest.raises(RuntimeError, match="in the middle"):
        stop_half_way_in(place)
    assert list(place.parent.iterdir()) == []
    with whole_folder(place) as partial:
        (partial / "whole").write_text("x")
        assert not place.exists()
    assert [path.name for path in place.parent.iterdir()] == ["folder"]
    assert (place / "whole").read_text() == "x"

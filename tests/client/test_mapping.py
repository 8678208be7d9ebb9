from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from client.mapping import SMALL, mapped


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("count", [0, 3, SMALL, 3 * SMALL])
@pytest.mark.parametrize("dtype", ["float32", "int64", "U5"])
def test_an_array_is_the_one_that_was_saved_and_can_not_be_written(tmp_path: Path, count: int, dtype: str) -> None:
    array = np.arange(3 * count).reshape(count, 3).astype(dtype)
    found = mapped(saved(tmp_path / "a.npy", array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert not found.flags.writeable


def test_no_descriptor_and_no_map_stays(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npy", np.arange(SMALL))
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [mapped(path) for _ in range(300)]
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before
    assert Path("/proc/self/maps").read_text().count(str(path)) == 300
    view = kept[7][5:9]
    path.unlink()  # what is mapped stays readable
    kept.clear()
    gc.collect()
    assert view.tolist() == [5, 6, 7, 8]
    assert Path("/proc/self/maps").read_text().count(str(path)) == 1
    del view
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("cut", [4, 40, SMALL, -8])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = saved(tmp_path / "a.npy", np.arange(SMALL))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises((ValueError, EOFError)):
        mapped(path)

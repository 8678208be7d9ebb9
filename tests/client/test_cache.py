"""The cache on disk: damage, limits, two processes, a full disk, and SIGKILL at random moments."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from client.cache import Cache
from client.errors import CacheError

from .disk import small_disk

ROOT = Path(__file__).resolve().parents[2]
KEY = "ab" + "0" * 62


def key(number: int) -> str:
    return f"{number:02x}".ljust(64, "0")


def entry(cache: Cache, name: str = KEY, size: int = 100) -> dict[str, np.ndarray]:
    arrays = {"x": np.arange(size, dtype=np.float32).reshape(-1, 2), "empty": np.zeros((0, 4), np.int64)}
    cache.put(name, {"n": 1, "who": "p"}, arrays)
    return arrays


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob("*/.tmp-*"))


def test_an_entry_comes_back_mapped_and_read_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1)
    assert cache.get(KEY) is None
    arrays = entry(cache)
    found = Cache(tmp_path, 1).get(KEY)
    assert found is not None
    assert found.values == {"n": 1, "who": "p"}
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array)
    assert not found.arrays["x"].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        found.arrays["x"][0, 0] = 1
    assert not leftovers(tmp_path)


def test_parts_make_the_entry_that_the_whole_would(tmp_path: Path) -> None:
    arrays = entry(Cache(tmp_path / "whole", 1))
    x = arrays["x"]
    parts = (
        {"x": x[first : first + 7], "empty": x[first : first + 7].astype(np.int64)[:, :0]} for first in range(0, 50, 7)
    )
    found = Cache(tmp_path / "parts", 1).put_parts(KEY, {"n": 1, "who": "p"}, 50, parts)
    assert np.array_equal(found.arrays["x"], x)
    assert found.arrays["empty"].shape == (50, 0)
    whole, written = (next((tmp_path / name).rglob("x.npy")).read_bytes() for name in ("whole", "parts"))
    assert written == whole


def test_parts_that_fail_or_would_be_too_large_leave_nothing(tmp_path: Path) -> None:
    def failing() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": np.zeros((3, 1000))}
        raise ArithmeticError("no such signal")

    cache = Cache(tmp_path, 1e-4)
    with pytest.raises(ArithmeticError):
        cache.put_parts(KEY, {}, 6, failing())
    with pytest.raises(CacheError, match=r"one cache entry needs 0.001 GB"):
        cache.put_parts(KEY, {}, 100, failing())
    assert cache.get(KEY) is None
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "emptied", "no array", "no index", "torn index", "other index", "replaced"]
)
def test_a_damaged_entry_is_found_deleted_and_computed_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path, 1)
    arrays = entry(cache)
    place = tmp_path / KEY[:2] / KEY
    array, index = place / "x.npy", place / "entry.json"
    content = array.read_bytes()
    if damage == "truncated":
        array.write_bytes(content[:-8])
    elif damage == "flipped":
        array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "emptied":
        array.write_bytes(b"")
    elif damage == "no array":
        array.unlink()
    elif damage == "no index":
        index.unlink()
    elif damage == "torn index":
        index.write_text(index.read_text()[:-20])
    elif damage == "other index":
        index.write_text(json.dumps([1]))
    else:
        np.save(array, np.ones((50, 2), np.float32))
    assert cache.get(KEY) is None
    assert not place.exists()
    entry(cache)
    again = cache.get(KEY)
    assert again is not None
    assert np.array_equal(again.arrays["x"], arrays["x"])


def test_a_copied_cache_is_still_good(tmp_path: Path) -> None:
    """Other modification times: every byte is looked at, and fits."""
    arrays = entry(Cache(tmp_path, 1))
    os.utime(tmp_path / KEY[:2] / KEY / "x.npy", (1, 1))
    found = Cache(tmp_path, 1).get(KEY)
    assert found is not None
    assert np.array_equal(found.arrays["x"], arrays["x"])


def test_the_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10e-6)  # 10 kB, an entry has about 2.4
    size = 500
    for number in range(4):
        entry(cache, key(number), size)
        stamp = time.time() - 1000 + number
        os.utime(tmp_path / key(number)[:2] / key(number) / "entry.json", (stamp, stamp))
    assert cache.get(key(0)) is not None  # used now
    entry(cache, key(9), size)
    kept = [number for number in (0, 1, 2, 3, 9) if cache.get(key(number)) is not None]
    assert {0, 3, 9} >= set(kept) >= {0, 9}
    total = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert total <= 10_000
    assert not leftovers(tmp_path)


def test_other_processes_entries_count_towards_the_limit(tmp_path: Path) -> None:
    ours, theirs = Cache(tmp_path, 30e-6), Cache(tmp_path, 1)
    entry(ours, key(0), 500)
    for number in range(1, 40):
        entry(theirs, key(number), 500)
    for number in range(40, 40 + 64):
        entry(ours, key(number), 500)
    total = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert total <= 30_000


def test_deleting_leaves_mapped_arrays_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 4e-6)
    arrays = entry(cache, key(0), 500)
    held = cache.get(key(0))
    assert held is not None
    entry(cache, key(1), 500)
    assert cache.get(key(0)) is None
    assert np.array_equal(held.arrays["x"], arrays["x"])


def test_a_limit_below_one_pass_is_said_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        cache = Cache(tmp_path, 10e-6)
        with caplog.at_level("WARNING", logger="fedbridge.site"):
            for number in range(8):
                entry(cache, key(number), 500)
    assert caplog.text.count("cache.max_gigabytes is too small") == 2


def test_an_entry_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1e-6)
    with pytest.raises(CacheError, match=r"cache.max_gigabytes is 1e-06"):
        cache.put(KEY, {}, {"x": np.zeros(1000)})
    assert not list(tmp_path.iterdir())


def test_sweeping_takes_old_leftovers_only(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1)
    entry(cache)
    old, young = tmp_path / "ab" / ".tmp-1", tmp_path / "ab" / ".tmp-2"
    for folder in (old, young):
        folder.mkdir()
        (folder / "x.npy").write_bytes(b"half")
    os.utime(old, (1, 1))
    assert cache.sweep() == 1
    assert leftovers(tmp_path) == [young]
    assert cache.get(KEY) is not None


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match=r"can't be written(.|\n)*name another cache.folder"):
        entry(Cache(tmp_path / "file", 1))


def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        cache = Cache(disk, 1)
        entry(cache, key(0), 100_000)
        with pytest.raises(CacheError, match=r"can't be written(.|\n)*free space"):
            cache.put(key(1), {}, {"a": np.ones(20_000), "b": np.ones(60_000)})
        assert not leftovers(disk)
        assert cache.get(key(1)) is None
        found = cache.get(key(0))
        assert found is not None
        assert found.arrays["x"][-1, -1] == 99_999
        entry(cache, key(2), 1000)
        assert cache.get(key(2)) is not None


def _write_under_a_file_limit(folder: Path, answer: multiprocessing.Queue) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        Cache(folder, 1).put(KEY, {}, {"x": np.zeros(10_000)})
    except CacheError as error:
        answer.put(str(error))


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    answer: multiprocessing.Queue = multiprocessing.Queue()
    child = multiprocessing.get_context("fork").Process(target=_write_under_a_file_limit, args=(tmp_path, answer))
    child.start()
    assert "can't be written" in answer.get(timeout=30)
    child.join(30)
    assert not leftovers(tmp_path)
    assert Cache(tmp_path, 1).get(KEY) is None


WRITER = """
import sys
import numpy as np
from pathlib import Path
from client.cache import Cache
cache = Cache(Path(sys.argv[1]), float(sys.argv[3]))
rng = np.random.default_rng(int(sys.argv[2]))
print("ready", flush=True)
for step in range(int(sys.argv[4])):
    number = int(rng.integers(0, 40))
    key = f"{number:02x}".ljust(64, "0")
    found = cache.get(key)
    if found is None:
        found = cache.put(key, {"n": number}, {"a": np.full(3000, number), "b": np.full((50, 7), number)})
    assert (found.arrays["a"] == number).all() and (found.arrays["b"] == number).all() and found.values["n"] == number
print("done", flush=True)
"""


def start(folder: Path, seed: int, gigabytes: float, steps: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(folder), str(seed), str(gigabytes), str(steps)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("gigabytes", [1.0, 0.4e-3])
def test_two_processes_at_once(tmp_path: Path, gigabytes: float) -> None:
    """The second limit, 400 kB for 40 entries of 27 kB, makes each delete what the other wants."""
    children = [start(tmp_path, seed, gigabytes, 400) for seed in (1, 2)]
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert out.split() == ["ready", "done"]
    assert not leftovers(tmp_path)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_half_written(tmp_path: Path) -> None:
    moments = random.Random(5)
    for attempt in range(20):
        child = start(tmp_path, attempt, 0.4e-3, 1_000_000)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait(30)
        child.stdout.close()
        for number in range(40):
            found = Cache(tmp_path, 1).get(key(number))
            if found is not None:
                assert (found.arrays["a"] == number).all()
                assert (found.arrays["b"] == number).all()
    for folder in leftovers(tmp_path):
        os.utime(folder, (1, 1))
    left = Cache(tmp_path, 1).sweep()
    assert not leftovers(tmp_path)
    survivor = start(tmp_path, 99, 0.4e-3, 200)
    _, err = survivor.communicate(timeout=60)
    assert survivor.returncode == 0, err
    assert left <= 20

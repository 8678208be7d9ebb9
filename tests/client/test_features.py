"""Frozen features: equal to running the networks, computed once, keyed by everything that decides them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bridge.encoders.loading import load_encoder
from bridge.errors import PositionError
from bridge.head import load_head
from client.errors import CacheError, ModelsError, NoWindowsError
from client.features import FeatureSet, features
from client.site import open_site
from client.windowing import windows_of

from .disk import small_disk
from .sites import BLOCKS, TOKENS, WIDTH, build_models, build_site

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    return build_site(tmp_path / "a", "a", models=models, patients=8)


def entries(folder: Path) -> dict[str, int]:
    """Every cached array and when it was written."""
    return {str(path): path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.npy")}


def fresh(folder: Path, split: str = "pair") -> FeatureSet:
    """The features without what this process remembers: the site file's path is another one."""
    other = folder / f"site-{len(list(folder.iterdir()))}.yaml"
    shutil.copy(folder / "site.yaml", other)
    return features(open_site(other), split)  # type: ignore[arg-type]


def edit(folder: Path, **changes: object) -> None:
    content = yaml.safe_load((folder / "site.yaml").read_text())
    (folder / "site.yaml").write_text(yaml.safe_dump({**content, **changes}))


def test_features_are_what_the_networks_give(folder: Path, models: Path) -> None:
    site = open_site(folder)
    found, windows = features(site, "pair"), windows_of(site, "pair")
    old, new = load_encoder(models / "old_encoder"), load_encoder(models / "new_encoder")
    assert windows.old is not None
    assert windows.new is not None
    x_old, x_new = torch.from_numpy(windows.old), torch.from_numpy(windows.new)
    assert len(found) == len(windows.table) == 4 * 12
    for name in ("patients", "recordings", "starts", "labels", "groups"):
        assert np.array_equal(getattr(found.table, name), getattr(windows.table, name)), name
    with torch.no_grad():
        for m in range(BLOCKS["PPG"]):
            assert np.allclose(found.new_output(m), new.prefix(x_new, m).mean(1).numpy(), atol=1e-5), m
        for l in range(BLOCKS["ECG"]):  # noqa: E741
            whole = old.prefix(x_old, l - 1) if l else old.taps(x_old, lambda h: h).inputs[0]
            assert np.allclose(found.old_input(l), whole.mean(1).numpy(), atol=1e-5), l
            assert np.allclose(found.old_input_tokens(l, [7, 3, 7, 40]), whole[[7, 3, 7, 40]].numpy(), atol=1e-5), l
        final = old.prefix(x_old, BLOCKS["ECG"] - 1)
        logits = load_head(models / "task_head")(final.mean(1))
    rows = np.array([47, 0, 13, 12, 12])
    assert found.old_tokens(rows).shape == (5, TOKENS, WIDTH)
    assert found.old_tokens(rows).dtype == np.float32
    assert np.allclose(found.old_tokens(rows), final[rows].numpy(), atol=1e-5)
    assert np.allclose(found.teacher_logits, logits.numpy(), atol=1e-5)
    assert np.array_equal(found.pseudo_labels, logits.argmax(1).numpy())
    assert (found.pseudo_labels == found.table.labels).mean() > 0.6


def test_positions_and_rows_out_of_range_are_refused(folder: Path) -> None:
    found = features(open_site(folder), "pair")
    for call in (lambda: found.new_output(BLOCKS["PPG"]), lambda: found.old_input(-1)):
        with pytest.raises(PositionError):
            call()
    for rows in ([48], [-1]):
        with pytest.raises(IndexError, match="rows must lie in 0 to 47"):
            found.old_tokens(rows)
    assert found.old_tokens([]).shape == (0, TOKENS, WIDTH)


def test_nothing_is_computed_twice_and_splits_share_the_cache(folder: Path) -> None:
    first = features(open_site(folder), "pair")
    written = entries(folder)
    assert len([path for path in written if path.endswith("tokens.npy")]) == 4
    again = fresh(folder)
    assert entries(folder) == written
    assert np.array_equal(again.new_output(1), first.new_output(1))
    content = yaml.safe_load((folder / "site.yaml").read_text())
    test = content["splits"]["test"]
    edit(folder, splits={"pair": content["splits"]["pair"][:2], "validation": [], "test": test})
    narrower = features(open_site(folder), "pair")
    assert entries(folder) == written
    assert set(narrower.table.patients.tolist()) == set(content["splits"]["pair"][:2])
    fresh(folder, "test")
    assert len([path for path in entries(folder) if path.endswith("tokens.npy")]) == 4 + len(test)


def test_one_process_gets_the_same_object_until_a_file_changes(folder: Path) -> None:
    first = features(open_site(folder), "pair")
    assert features(open_site(folder), "pair") is first
    recording = next(path for path in sorted((folder / "recordings").iterdir()) if path.stem in first.table.recordings)
    content = dict(np.load(recording))
    content["PPG"] = content["PPG"][:, ::-1]
    np.savez(recording, **content)
    second = features(open_site(folder), "pair")
    assert second is not first
    mine = second.table.recordings == recording.stem
    assert not np.allclose(second.new_output(1)[mine], first.new_output(1)[mine])
    assert np.array_equal(second.new_output(1)[~mine], first.new_output(1)[~mine])


def test_results_do_not_depend_on_the_other_recordings(folder: Path, models: Path, tmp_path: Path) -> None:
    whole = features(open_site(folder), "pair")
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("cache", "site-*"))
    patient = whole.table.patients[-1]
    for path in (alone / "recordings").iterdir():
        if path.stem != patient:
            path.unlink()
    found, mine = features(open_site(alone), "pair"), whole.table.patients == patient
    assert np.array_equal(found.new_output(2), whole.new_output(2)[mine])
    assert np.array_equal(found.teacher_logits, whole.teacher_logits[mine])
    assert np.array_equal(found.old_tokens(range(12)), whole.old_tokens(np.flatnonzero(mine)))


@pytest.mark.parametrize(
    ("changes", "recomputed"),
    [
        ({"policy": "other.yaml"}, False),
        ({"cache": {"folder": "cache", "max_gigabytes": 3}}, False),
        ({"window": {"seconds": 4, "step_seconds": 2}}, True),
        ({"quality": {"flat_share": 0.3}}, True),
        ({"labels": {"source": "none"}}, True),
    ],
)
def test_what_decides_features_is_in_their_key(folder: Path, changes: dict, recomputed: bool) -> None:
    features(open_site(folder), "pair")
    before = entries(folder)
    edit(folder, **changes)
    found = features(open_site(folder), "pair")
    new = set(entries(folder)) - set(before)
    assert bool(new) == recomputed
    assert all(entries(folder)[path] == stamp for path, stamp in before.items())
    if "window" in changes:
        assert len(found) == 4 * 23


def test_other_weights_are_computed_anew_and_give_other_features(folder: Path, tmp_path: Path) -> None:
    first = features(open_site(folder), "pair")
    before = entries(folder)
    others = build_models(tmp_path / "others", seed=1)
    edit(folder, models={name: str(others / name) for name in ("old_encoder", "new_encoder", "task_head")})
    second = features(open_site(folder), "pair")
    new = {Path(path).name for path in set(entries(folder)) - set(before)}
    assert new == {"inputs.npy", "outputs.npy", "pooled.npy", "tokens.npy"}  # the windows themselves are kept
    assert not np.allclose(first.new_output(0), second.new_output(0))


def test_csv_labels_are_part_of_the_key(folder: Path) -> None:
    names = sorted(path.stem for path in (folder / "recordings").iterdir())
    rows = [f"{name},0,24,slow,early\n{name},24,48,fast,late\n" for name in names]
    table = folder / "labels.csv"
    table.write_text("recording,start_seconds,end_seconds,label,group\n" + "".join(rows))
    edit(folder, labels={"source": "csv", "path": "labels.csv", "classes": ["slow", "fast"]})
    found = features(open_site(folder), "pair")
    assert found.table.labels.tolist() == ([0] * 6 + [1] * 6) * 4
    assert found.table.groups.tolist() == (["early"] * 6 + ["late"] * 6) * 4
    table.write_text(table.read_text().replace(f"{names[0]},0,24,slow", f"{names[0]},0,24,fast"))
    changed = features(open_site(folder), "pair")
    assert changed.table.labels.tolist() == [1] * 12 + ([0] * 6 + [1] * 6) * 3


def test_a_damaged_entry_is_computed_again(folder: Path) -> None:
    first = features(open_site(folder), "pair").new_output(1).copy()
    for path in (folder / "cache").rglob("outputs.npy"):
        path.write_bytes(path.read_bytes()[:-100])
    assert np.array_equal(fresh(folder).new_output(1), first)


def test_rejections_and_bad_files_travel_with_the_features(folder: Path) -> None:
    paths = sorted((folder / "recordings").iterdir())
    content = dict(np.load(paths[0]))
    content["ECG"][:, 0:320] = 0
    np.savez(paths[0], **content)
    paths[1].write_bytes(paths[1].read_bytes()[:1000])
    for found in (features(open_site(folder), "pair"), fresh(folder)):
        assert found.rejected == {"ECG flat": 2}
        assert [problem.path.name for problem in found.problems] == [paths[1].name]
        assert len(found) == 3 * 12 - 2


def test_no_window_and_no_models_are_named(folder: Path) -> None:
    site = open_site(folder)
    edit(folder, splits={"pair": [], "validation": [], "test": []})
    with pytest.raises(NoWindowsError, match="split 'pair'"):
        features(open_site(folder), "pair")
    (site.model_folder("old_encoder").parent / "x").mkdir(exist_ok=True)
    edit(folder, models={"old_encoder": "gone", "new_encoder": "gone", "task_head": "gone"})
    with pytest.raises(ModelsError, match="no complete model folder"):
        features(open_site(folder), "pair")


def test_a_full_disk_while_caching_is_an_error_and_enough_space_then_does(folder: Path, tmp_path: Path) -> None:
    expected = features(open_site(folder), "pair").old_tokens([0, 30])
    with small_disk(tmp_path / "disk") as disk:
        edit(folder, cache={"folder": str(disk)})
        (disk / "others").write_bytes(b"x" * 1_000_000)
        with pytest.raises(CacheError, match=r"can't be written(.|\n)*free space"):
            features(open_site(folder), "pair")
        assert not list(disk.glob("*/.tmp-*"))
        (disk / "others").unlink()
        assert np.array_equal(features(open_site(folder), "pair").old_tokens([0, 30]), expected)


READ = """
import json, sys, time
from pathlib import Path
from client.features import features
from client.site import open_site
start = time.perf_counter()
found = features(open_site(Path(sys.argv[1])), "pair")
seconds = time.perf_counter() - start
sums = [float(each.sum()) for each in (found.new_output(1), found.old_tokens([3]))]
print(json.dumps([seconds, *sums, "torch" in sys.modules]))
"""


def test_a_later_process_reads_without_any_network(folder: Path) -> None:
    found = features(open_site(folder), "pair")
    run = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, outputs, tokens, torch_was_loaded = json.loads(run.stdout)
    assert outputs == float(found.new_output(1).sum())
    assert tokens == float(found.old_tokens([3]).sum())
    assert not torch_was_loaded
    assert seconds < 5


KILL = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import bridge.encoders.compact, bridge.encoders.loading, bridge.head
from client.features import features
from client.site import open_site
folder, moments, unfinished = Path(sys.argv[1]), random.Random(7), 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        features(open_site(folder), "pair")
        os._exit(0)
    time.sleep(moments.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    unfinished += os.WIFSIGNALED(status)
    if len(list((folder / "cache").rglob("tokens.npy"))) == 20:
        shutil.rmtree(folder / "cache")
print(unfinished)
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_cache_gives_the_same_features(models: Path, tmp_path: Path) -> None:
    folder = build_site(tmp_path / "k", "k", models=models, patients=40)
    reference = tmp_path / "reference"
    shutil.copytree(folder, reference)
    expected = features(open_site(reference), "pair")
    run = subprocess.run(
        [sys.executable, "-c", KILL, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) >= 10
    found = features(open_site(folder), "pair")
    assert np.array_equal(found.table.starts, expected.table.starts)
    assert np.array_equal(found.new_output(3), expected.new_output(3))
    assert np.array_equal(found.old_tokens(range(len(found))), expected.old_tokens(range(len(expected))))

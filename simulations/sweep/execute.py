"""Runs of a sweep side by side: several processes, one torch thread each, on features that are computed once.

    OUT/sweep.yaml            the sweep with its base, every key written out
    OUT/rows/<key>.json       one row a finished run, whole or not there at all
    OUT/runs/<key>/           what a run leaves: record, log, bridge, statement, report; recordings and models go
    OUT/results.csv, .json, curves.png, curves.svg, report.html

A row is named by the run's whole configuration, so a sweep that is killed, or grows, computes only what is missing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from bridge.errors import FedbridgeError
from bridge.files import write_whole
from bridge.hashing import sha256_json
from server.errors import RunFolderError
from simulations.progress import Progress
from simulations.sweep.grid import Point, SweepConfig, expand
from simulations.sweep.table import Row, failed_row, read_row, row_of, write_row, write_tables

SWEEP, ROWS, RUNS, SHARED = "sweep.yaml", "rows", "runs", "shared"
_LOCK = ".lock"
_PRUNED = ("sites", "models", "app", "controls", "checkpoints")
_DEATHS = 2
"""A run whose process has died so often is given up."""


def run_sweep(
    sweep: SweepConfig,
    out: Path,
    *,
    workers: int = 2,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress,
) -> list[Row]:
    """Run every point of a sweep that has no completed row in `out`, write the tables, and return all rows in order.

    A run that fails is a row with its error, and is tried again by `resume`. Raises `RunFolderError` where `out` holds
    something else, or a sweep and neither `resume` nor `overwrite` is asked for.
    """
    out = out.absolute()
    points = expand(sweep)
    _check_way(out, resume, overwrite)
    with _alone(out):
        if overwrite:
            _clear(out)
        write_whole(out / SWEEP, yaml.safe_dump(sweep.model_dump(mode="json", by_alias=True), sort_keys=False))
        rows = {point.key: row for point in points if (row := _completed(out, point)) is not None}
        left = [point for point in points if point.key not in rows]
        progress("runs", len(rows), len(points))
        if left:
            share_features(left, out, workers, progress)
        tasks = {point.key: (_run_point, point, out) for point in left}
        for key, result in side_by_side(tasks, workers):
            point = next(point for point in left if point.key == key)
            row = result if isinstance(result, Row) else failed_row(point, str(result))
            write_row(out / ROWS, row)
            rows[key] = row
            progress("runs", len(rows), len(points))
        listed = [rows[point.key] for point in points]
        write_tables(out, listed)
    return listed


def _completed(out: Path, point: Point) -> Row | None:
    """The row of an earlier start, with the labels that the sweep has now."""
    row = read_row(out / ROWS, point.key)
    if row is None or row.status != "completed":
        return None
    return row.model_copy(update={"labels": dict(point.labels)})


def share_features(points: Sequence[Point], out: Path, workers: int, progress: Progress) -> None:
    """Compute recordings, encoders and frozen features once, into the cache, for each different data and encoders."""
    from simulations.prepare import prepare, site_folders

    kinds: dict[str, Point] = {}
    for point in points:
        content = point.config.model_dump(mode="json", include={"data", "split", "encoders"})
        kinds.setdefault(sha256_json(content), point)
    place = out / SHARED
    shutil.rmtree(place, ignore_errors=True)
    tasks: dict[str, Any] = {}
    for number, point in enumerate(kinds.values()):
        try:
            folder = prepare(point.config, place / str(number), progress=progress)
        except FedbridgeError:
            continue  # the run itself will fail by it, and its row will say so
        tasks |= {str(site): (_site_features, site) for site in site_folders(folder)}
    progress("features", 0, len(tasks))
    for done, _ in enumerate(side_by_side(tasks, workers), start=1):
        progress("features", done, len(tasks))
    shutil.rmtree(place, ignore_errors=True)


def _site_features(folder: Path) -> None:
    from client.errors import NoWindowsError
    from client.features import features
    from client.site import open_site

    site = open_site(folder)
    for split in ("pair", "validation", "test"):
        if getattr(site.file.splits, split):
            try:
                features(site, split)
            except NoWindowsError:
                continue


def _run_point(point: Point, out: Path) -> Row:
    """One run in this process, its row, and only what is small of its folder."""
    from client.features import drop_sets
    from simulations.run import run

    drop_sets()  # each run has site folders of its own
    folder, started = out / RUNS / point.key, time.monotonic()
    record = run(point.config, folder, resume=True)
    row = row_of(point, folder, record, time.monotonic() - started)
    write_row(out / ROWS, row)
    for name in _PRUNED:
        shutil.rmtree(folder / name, ignore_errors=True)
    return row


def side_by_side(tasks: Mapping[str, Any], workers: int) -> Iterator[tuple[str, Any]]:
    """Name and result of each `(function, *arguments)`, as they are done; an exception is a result as text.

    A process that dies takes the whole pool with it: what was under way starts again in a new one.
    """
    left, deaths = dict(tasks), Counter[str]()
    while left:
        started: dict[Future[Any], str] = {}
        with _pool(min(workers, len(left))) as pool:
            try:
                yield from _answers(pool, left, started, workers)
            except BrokenProcessPool:
                deaths.update(started.values())
        for name in [name for name in left if deaths[name] >= _DEATHS]:
            del left[name]
            yield name, "its process was killed, or ended by itself, twice"


def _answers(
    pool: ProcessPoolExecutor, left: dict[str, Any], started: dict[Future[Any], str], workers: int
) -> Iterator[tuple[str, Any]]:
    """Take tasks out of `left` as they are done; `started` names those under way, no more than can be at a time, so
    that a pool which breaks names who may have broken it."""
    waiting = list(left)
    while waiting or started:
        while waiting and len(started) < workers:
            name = waiting.pop(0)
            started[pool.submit(_guarded, *left[name])] = name
        done, _ = wait(started, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda each: each.exception() is not None):
            result = future.result()
            name = started.pop(future)
            del left[name]
            yield name, result


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    """A task's result, or what it raised as text: one run that fails does not end the sweep."""
    try:
        return function(*arguments)
    except FedbridgeError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()


def _start_worker() -> None:
    """Set up a process of the pool: one thread, no voice on the terminal, and an end when its parent is killed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.getLogger("fedbridge.site").setLevel(logging.ERROR)
    threading.Thread(target=_end_with_parent, name="orphaned", daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_way(out: Path, resume: bool, overwrite: bool) -> None:
    """Raise `RunFolderError` unless the sweep may use `out`: empty, or its own and asked for."""
    if not out.is_dir() or not _content(out):
        return
    if not (out / SWEEP).is_file():
        raise RunFolderError(
            f"{out}: is not an empty folder", why=f"it is no sweep either: it has no {SWEEP}", fix="name another --out"
        )
    if not (resume or overwrite):
        raise RunFolderError(
            f"{out}: already holds a sweep",
            why="results are never overwritten unasked",
            fix="--resume computes what is missing, --overwrite begins anew, --out names another folder",
        )


def _content(out: Path) -> list[Path]:
    return [each for each in out.iterdir() if each.name != _LOCK]


def _clear(out: Path) -> None:
    for each in _content(out):
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / _LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunFolderError(
            f"{out}: another sweep runs there", why=f"{_LOCK} is held", fix="wait for it, or name another --out"
        ) from error
    except OSError as error:
        raise RunFolderError(f"{out}: can't be written", why=error.strerror or "", fix="name another --out") from error
    try:
        yield
    finally:
        lock.release()

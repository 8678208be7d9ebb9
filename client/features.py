"""A site's frozen features: computed once for each recording and encoder, kept on disk, read by memory map.

The encoders never change, so what they make of a window is computed in ONE forward pass and cached under a hash of all
that decides it: the recording's bytes, reader, signals, window, quality and label keys, preprocessing, encoder, and the
precision it computes in. Device and batches are no part of it, since in float32 they change nothing beyond 1e-5.
Splits and policies are no part of the key: another division of the patients computes nothing again. Every entry names
its patient, so that it can be found when the patient withdraws; of patients who did, nothing is computed or kept.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bridge.compute import Precision
from bridge.encoders.cards import EncoderCard
from bridge.errors import WeightsError
from bridge.hashing import sha256_file, sha256_json
from client.cache import Cache, Entry
from client.errors import ModelsError, RecordingError, SiteError
from client.forget import Withdrawn, withdrawn
from client.labels import LabelSource
from client.site import Site
from client.site_file import Role, Split
from client.windowing import Cut, FileProblem, WindowTable, cut, formats_of, no_windows, report_problems

if TYPE_CHECKING:
    from bridge.encoders.placed import PlacedEncoder

log = logging.getLogger("fedbridge.site")

FORMAT = 2
"""Part of every key: raise it when the same input gives other windows or features, or entries hold something else."""

BATCH = 64
"""Windows in one forward pass, fewer where memory would not do. A pass holds windows of one recording alone, so results
depend on nothing else."""

ROLES: tuple[Role, ...] = ("old", "new")

Progress = Callable[[int, int], None]
Floats = NDArray[np.float32]

_hashes: dict[tuple[str, int, int], str] = {}
_sets: dict[tuple[str, str], tuple[str, FeatureSet]] = {}
_KEPT_SETS = 256


@dataclass
class FeatureSet:
    """Features of all windows of a split, in the rows of `table`. Pooled arrays are `(n, width)` float32.

    Small arrays are gathered when asked for; tokens stay on disk and are read row by row.
    """

    table: WindowTable
    rejected: Counter[str]
    problems: tuple[FileProblem, ...]
    _site: Site
    _recordings: list[_Recording]
    _cache: Cache
    _gathered: dict[tuple[str, str, int], Floats] = field(default_factory=dict)
    _logits: Floats | None = None
    _encoder: PlacedEncoder | None = None

    def __post_init__(self) -> None:
        self._firsts = np.cumsum([0, *[len(each) for each in self._recordings]])

    def __len__(self) -> int:
        return len(self.table)

    def new_output(self, m: int) -> Floats:
        """Pooled output of position `m` of the new encoder, `(n, width)`."""
        self._site.new_card.layout(m, "out")
        return self._pooled("new", "outputs", m)

    def old_input(self, l: int) -> Floats:  # noqa: E741
        """Pooled input of position `l` of the old encoder, `(n, width)`."""
        self._site.old_card.layout(l, "in")
        return self._pooled("old", "inputs", l)

    def old_tokens(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Floats:
        """The old encoder's own final tokens of some rows, `(k, tokens, width)`: the alignment target."""
        shape = self._site.old_card.layouts_out[-1]
        return self._rows(lambda recording: recording.entries["old"].arrays["tokens"], rows, shape)

    def old_input_tokens(self, l: int, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Floats:  # noqa: E741
        """Unpooled input of position `l` of the old encoder, `(k, tokens, width)`; computed and cached at first use."""
        shape = self._site.old_card.layout(l, "in")
        return self._rows(lambda recording: self._input_tokens(recording, l), rows, shape)

    @property
    def teacher_logits(self) -> Floats:
        """The task head on the old encoder's pooled final tokens, `(n, classes)`."""
        if self._logits is None:
            pooled = np.concatenate([each.entries["old"].arrays["pooled"] for each in self._recordings])
            self._logits = _head_logits(self._site, pooled, [len(each) for each in self._recordings])
        return self._logits

    @property
    def pseudo_labels(self) -> NDArray[np.int64]:
        """The teacher's class of each window, `(n,)`: no human label."""
        return np.asarray(self.teacher_logits.argmax(axis=1), dtype=np.int64)

    def _pooled(self, role: Role, kind: str, position: int) -> Floats:
        key = (role, kind, position)
        if key not in self._gathered:
            card = self._site.old_card if role == "old" else self._site.new_card
            widths = [width for _, width in (card.layouts_in if kind == "inputs" else card.layouts_out)]
            first = sum(widths[:position])
            part = slice(first, first + widths[position])
            self._gathered[key] = np.concatenate(
                [each.entries[role].arrays[kind][:, part] for each in self._recordings]
            )
        return self._gathered[key]

    def _rows(
        self,
        array_of: Callable[[_Recording], NDArray[Any]],
        rows: Sequence[int] | NDArray[np.integer[Any]],
        shape: tuple[int, int],
    ) -> Floats:
        index = np.asarray(rows, dtype=np.int64)
        firsts = self._firsts
        if len(index) and (index.min() < 0 or index.max() >= firsts[-1]):
            raise IndexError(f"rows must lie in 0 to {firsts[-1] - 1}")
        owners = np.searchsorted(firsts, index, side="right") - 1
        out = np.empty((len(index), *shape), dtype=np.float32)
        for owner in np.unique(owners):
            mine = np.flatnonzero(owners == owner)
            out[mine] = array_of(self._recordings[owner])[index[mine] - firsts[owner]]
        return out

    def _input_tokens(self, recording: _Recording, l: int) -> NDArray[Any]:  # noqa: E741
        name = f"input_tokens_{l}"
        if name not in recording.entries:
            key = sha256_json([recording.keys["old"], name])
            entry = self._cache.get(key)
            if entry is None:
                if self._encoder is None:
                    self._encoder = load_role(self._site, "old")
                signals = recording.windows(self._site).signals["old"]
                values = {"patient": recording.patient}
                parts = _unpooled_inputs(self._encoder, signals, l)
                entry = self._cache.put_parts(key, values, len(signals), parts)
                recording.forget_windows()
            recording.entries[name] = entry
        return recording.entries[name].arrays["tokens"]


@dataclass
class _Recording:
    """One recording on its way: its file, its keys, its windows' table and its entries."""

    path: Path
    patient: str
    table: WindowTable
    rejected: Counter[str]
    keys: Mapping[str, str]
    labels: LabelSource
    entries: dict[str, Entry] = field(default_factory=dict)
    _cut: Cut | None = None

    def __len__(self) -> int:
        return len(self.table)

    def windows(self, site: Site) -> Cut:
        """The windows themselves, read again from the file unless they have just been cut."""
        if self._cut is None:
            self._cut = cut(site.reader.read(self.path), site.file, formats_of(site, ROLES), self.labels)
        return self._cut

    def forget_windows(self) -> None:
        """Let go of the signals."""
        self._cut = None


def features(site: Site, split: Split, progress: Progress | None = None) -> FeatureSet:
    """The features of a split; what is not in the cache is computed (`progress(done, files)` after each file).

    Files that can't be used are logged, listed in `problems` and left out. Patients who have withdrawn are left out in
    silence. Raises `NoWindowsError` where no window is left, `ModelsError`, `SiteFileError`, `CacheError` and
    `LedgerError`. A process that asks again for a set of which no file has changed gets the same object.
    """
    paths, gone = site.files(), withdrawn(site)
    place, stamp = (str(site.path), split), _stamp(site, paths, gone)
    if stamp is not None and place in _sets and _sets[place][0] == stamp:
        return _sets[place][1]
    found = _opened(site, split, paths, gone, progress)
    if stamp is not None:
        _sets[place] = (stamp, found)
        while len(_sets) > _KEPT_SETS:
            _sets.pop(next(iter(_sets)))
    return found


def drop_sets() -> None:
    """Let go of the feature sets that this process keeps, where it goes on with other sites."""
    _sets.clear()


def _opened(site: Site, split: Split, paths: Sequence[Path], gone: Withdrawn, progress: Progress | None) -> FeatureSet:
    cache = Cache(site.cache_folder, site.file.cache.max_gigabytes)
    cache.sweep()
    keys = _Keys(site)
    found: list[_Recording] = []
    problems: list[FileProblem] = []
    encoders: dict[Role, PlacedEncoder] = {}
    for done, path in enumerate(paths, start=1):
        try:
            recording = _index(site, path, keys, cache, gone)
            if recording is not None and site.file.splits.of(recording.patient) == split:
                if len(recording):
                    _complete(site, recording, cache, encoders)
                found.append(recording)
        except RecordingError as error:
            problems.append(FileProblem(path, error))
        except (SiteError, WeightsError, OSError):
            raise  # the site's own trouble, not that of one recording
        except Exception as error:  # whatever one recording does to a reader or a network concerns its patient alone
            problems.append(FileProblem(path, _unusable(path, error)))
        if progress is not None:
            progress(done, len(paths))
    report_problems(site, problems)
    rejected = sum((each.rejected for each in found), Counter[str]())
    used = [each for each in found if len(each)]
    if not used:
        raise no_windows(site, split, rejected, problems)
    table = WindowTable.joined([each.table for each in used])
    return FeatureSet(table, rejected, tuple(problems), site, used, cache)


def _unusable(path: Path, error: Exception) -> RecordingError:
    return RecordingError(
        f"{path.name}: can't be used", why=f"{type(error).__name__}: {error}", fix="see to the file, or exclude it"
    )


def _stamp(site: Site, paths: Sequence[Path], gone: Withdrawn) -> str | None:
    """Changes whenever a file behind a feature set does; None where a file can't even be looked at."""
    files = [] if site.file.labels.path is None else [site.resolve(site.file.labels.path)]
    try:
        files += [part for path in paths for part in site.reader.parts(path)]
        stats = [(str(file), file.stat()) for file in files]
    except (OSError, RecordingError):
        return None
    digests = [site.old_card.digest, site.new_card.digest, site.head_card.digest]
    looks = [[name, each.st_mtime_ns, each.st_size, each.st_ino] for name, each in stats]
    return sha256_json([site.file.model_dump(mode="json"), digests, looks, sorted(gone.hashes)])


def _index(site: Site, path: Path, source: _Keys, cache: Cache, gone: Withdrawn) -> _Recording | None:
    """A recording's windows (patient, starts, labels, rejections), from the cache or the file; None where its patient
    has withdrawn."""
    keys, labels = source.of(path), source.labels
    entry = cache.get(keys["windows"])
    fresh: Cut | None = None
    if entry is None:
        recording = site.reader.read(path)
        if recording.patient in gone:
            return None
        fresh = cut(recording, site.file, formats_of(site, ROLES), labels)
        fields: dict[str, Any] = {
            "patient": recording.patient,
            "name": recording.name,
            "groups": list(fresh.groups),
            "rejected": dict(fresh.rejected),
        }
        entry = cache.put(keys["windows"], fields, {"starts": fresh.starts, "labels": fresh.labels})
    values, n = entry.values, len(entry.arrays["starts"])
    if values["patient"] in gone:
        return None
    table = WindowTable(
        np.array([values["patient"]] * n, np.str_),
        np.array([values["name"]] * n, np.str_),
        np.array(entry.arrays["starts"]),
        np.array(entry.arrays["labels"]),
        np.array(values["groups"], np.str_),
    )
    return _Recording(path, values["patient"], table, Counter(values["rejected"]), keys, labels, _cut=fresh)


class _Keys:
    """Content keys of a site's recordings: of their windows, and of their features under each encoder."""

    def __init__(self, site: Site) -> None:
        self.labels = LabelSource.of(site)
        self._reader = site.reader
        self._cards: dict[Role, EncoderCard] = {"old": site.old_card, "new": site.new_card}
        settings = site.file.model_dump(mode="json", include={"reader", "old", "new", "window", "quality"})
        settings["labels"] = site.file.labels.model_dump(mode="json", exclude={"path"})
        channels = [card.window.channels for card in self._cards.values()]
        reader = [type(self._reader).__module__, type(self._reader).__qualname__, self._reader.version]
        self._common = sha256_json([FORMAT, reader, settings, channels])
        self._precision = site.file.compute.precision

    def of(self, path: Path) -> dict[str, str]:
        """The keys `windows`, `old` and `new` of one recording. Raises `RecordingError` where it can't be read."""
        parts = [[part.name, _hash(part)] for part in self._reader.parts(path)]
        name = self._reader.name(path)
        windows = sha256_json([self._common, self.labels.content(name), name, parts])
        keys = {role: _encoder_key(windows, card, self._precision) for role, card in self._cards.items()}
        return {"windows": windows} | keys


def _encoder_key(windows: str, card: EncoderCard, precision: Precision) -> str:
    parts = [windows, card.window.model_dump(mode="json"), card.preprocessing.model_dump(mode="json"), card.digest]
    return sha256_json(parts if precision == "float32" else [*parts, precision])


def _hash(path: Path) -> str:
    """sha256 of a file; hashed once a process unless its size or time changes."""
    try:
        status = path.stat()
        stamp = (str(path), status.st_mtime_ns, status.st_size)
        if stamp not in _hashes:
            _hashes[stamp] = sha256_file(path)
    except OSError as error:
        raise RecordingError(
            f"{path.name}: can't be read", why=error.strerror or "", fix="correct its permissions, or exclude the file"
        ) from error
    return _hashes[stamp]


def _complete(site: Site, recording: _Recording, cache: Cache, encoders: dict[Role, PlacedEncoder]) -> None:
    """Fill in the recording's features under both encoders."""
    for role in ROLES:
        entry = cache.get(recording.keys[role])
        if entry is None:
            if role not in encoders:
                encoders[role] = load_role(site, role)
            signals = recording.windows(site).signals[role]
            values = {"patient": recording.patient}
            parts = _computed(encoders[role], role, signals)
            entry = cache.put_parts(recording.keys[role], values, len(signals), parts)
        recording.entries[role] = entry
    recording.forget_windows()


def load_role(site: Site, role: Role) -> PlacedEncoder:
    """The site's old or new encoder, on its machine. Raises `ModelsError`, and `SiteFileError` where the machine can't
    compute as the site file says."""
    from client.networks import new_encoder, old_encoder

    try:
        return old_encoder(site) if role == "old" else new_encoder(site)
    except WeightsError as error:
        raise ModelsError(error.what, why=error.why, fix=error.fix) from error


def _computed(encoder: PlacedEncoder, role: Role, signals: Floats) -> Iterator[dict[str, Floats]]:
    """Batch after batch what is asked of an encoder later: the old one's `inputs`, final `tokens` and their mean
    `pooled`, the new one's `outputs`. Pooled arrays of all positions lie side by side, `(windows, sum of widths)`.
    """
    import torch

    for part in _batches(signals):
        # The mode must not reach who asks for the parts, so it ends before each is handed over.
        with torch.inference_mode():
            taps = encoder.taps(torch.from_numpy(part))
            if role == "old":
                found = {"inputs": torch.cat(taps.inputs, dim=1), "pooled": taps.outputs[-1], "tokens": taps.tokens}
            else:
                found = {"outputs": torch.cat(taps.outputs, dim=1)}
        yield {name: each.numpy() for name, each in found.items()}


def _unpooled_inputs(encoder: PlacedEncoder, signals: Floats, l: int) -> Iterator[dict[str, Floats]]:  # noqa: E741
    import torch

    for part in _batches(signals):
        with torch.inference_mode():
            tokens = encoder.input_tokens(torch.from_numpy(part), l)
        yield {"tokens": tokens.numpy()}


def _batches(signals: Floats) -> Iterator[Floats]:
    return (signals[first : first + BATCH] for first in range(0, len(signals), BATCH))


def _head_logits(site: Site, pooled: Floats, lengths: Sequence[int]) -> Floats:
    """Logits recording by recording, so that they depend on no other recording of the set."""
    import torch

    from bridge.head import load_head

    try:
        head = load_head(site.model_folder("task_head"))
    except WeightsError as error:
        raise ModelsError(error.what, why=error.why, fix=error.fix) from error
    edges = np.cumsum([0, *lengths])
    with torch.inference_mode():
        parts = [head(torch.from_numpy(pooled[a:b])).numpy() for a, b in itertools.pairwise(edges)]
    return np.concatenate(parts)

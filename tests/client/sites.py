"""Small real sites for tests: npz recordings, tiny compact encoders with a working head, and a job for them.

Two modalities show one hidden state: an `ECG` of 64 Hz and a `PPG` of 32 Hz whose rhythm is slow or fast, changing
every 12 s. Everything is seeded. `ask` sends one real Flower message to the real ClientApp.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.loading import save_encoder
from bridge.errors import ConfigError
from bridge.head import TaskHead, save_head
from bridge.job import Job, job_text
from bridge.messages import ITEMS, SENTENCES, ReasonCode
from bridge.prototype import initial_arrays
from bridge.shape import BridgeShape
from bridge.windows import Modality, Preprocessing, WindowSpec
from client.errors import SiteError
from tests.client.agreements import agree_once

CLASSES = ("slow", "fast")
ALL_ITEMS = tuple(ITEMS)
RATES: dict[Modality, int] = {"ECG": 64, "PPG": 32}
RHYTHM_HZ = (1.0, 1.8)
WINDOW_SECONDS, STATE_SECONDS, SECONDS = 4, 12, 48
BLOCKS: dict[Modality, int] = {"ECG": 3, "PPG": 4}
WIDTH, TOKENS = 16, 8
NOISE = 0.25
STEPS = 60
RANK, PROTOTYPES = 2, 4

EMPTY: dict[str, Any] = {}
"""A policy of defaults, but for the mechanism `none`, which is accepted wherever a test names no other."""

PERMISSIVE: dict[str, Any] = {"items": list(ALL_ITEMS), "privacy": {"mechanisms": ["none"]}}
"""A policy that lets every declared item out, without a mechanism."""


@dataclass(frozen=True)
class Small:
    """A site that permits everything, and its models (the fixture `small`)."""

    models: Path
    site: Path


def build_models(folder: Path, seed: int = 0) -> Path:
    """`old_encoder` (ECG), `new_encoder` (PPG) and `task_head`, trained for a second.

    The old encoder and its head learn the states; the new encoder learns its windows' log power spectra, label-free.
    """
    rng = np.random.default_rng(seed)
    states = rng.integers(0, 2, 256)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        old, head = _encoder("ECG"), TaskHead(WIDTH, len(CLASSES))
        windows = _windows("ECG", states, rng)
        _fit(old, head, windows, lambda logits, rows: F.cross_entropy(logits, torch.from_numpy(states)[rows]))
        new, windows = _encoder("PPG"), _windows("PPG", states, rng)
        spectra = torch.log(torch.fft.rfft(windows[:, 0]).abs()[:, 1:33].square() + 1.0)
        _fit(new, torch.nn.Linear(WIDTH, 32), windows, lambda guess, rows: F.mse_loss(guess, spectra[rows]))
    saved = [
        save_encoder(folder / name, encoder.state_dict(), encoder.card(Preprocessing(), {"data": "synthetic"}))
        for name, encoder in (("old_encoder", old), ("new_encoder", new))
    ]
    save_head(folder / "task_head", head, classes=CLASSES, old_encoder=saved[0].digest, training={})
    return folder


def build_site(
    folder: Path,
    name: str,
    *,
    models: Path | None = None,
    patients: int = 20,
    seed: int = 0,
    policy: Mapping[str, Any] | None = EMPTY,
    labels: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """A site folder: half of the patients give pairs, a quarter is for validation, a quarter for the test.

    `models` defaults to `folder/../models`. `policy` is written as `policy.yaml`; None: no policy file, the strictest
    defaults hold. `changes` replaces keys of the site file. Returns `folder`.
    """
    recordings = folder / "recordings"
    recordings.mkdir(parents=True)
    rng = np.random.default_rng([seed, 17])
    names = [f"{name}-p{i:02d}" for i in range(patients)]
    for patient in names:
        states = np.repeat(rng.permutation([0, 1, 0, 1]), STATE_SECONDS)
        signals: dict[str, Any] = {key: _signal(key, states, rng)[None] for key in RATES}
        np.savez(recordings / f"{patient}.npz", subject=patient, label=states, names=np.array(CLASSES), **signals)
    half, quarter = patients // 2, patients // 4
    file: dict[str, Any] = {
        "schema": "fedbridge.site/1",
        "site": name,
        "folder": "recordings",
        "reader": {"name": "npz", "options": _reader_options(labels)},
        "old": {"modality": "ECG", "channels": ["I"], "rate_hz": RATES["ECG"]},
        "new": {"modality": "PPG", "channels": ["P"], "rate_hz": RATES["PPG"]},
        "window": {"seconds": WINDOW_SECONDS, "step_seconds": WINDOW_SECONDS},
        "labels": {"source": "recording", "classes": list(CLASSES)} if labels else {"source": "none"},
        "splits": {
            "pair": names[:half],
            "validation": names[half : half + quarter],
            "test": names[half + quarter :],
        },
        "models": {
            key: str((models or folder.parent / "models") / key) for key in ("old_encoder", "new_encoder", "task_head")
        },
    }
    if policy is not None:
        file["policy"] = "policy.yaml"
        policy = {"privacy": {"mechanisms": ["none"]}, **policy}
        (folder / "policy.yaml").write_text(yaml.safe_dump(policy), encoding="utf-8")
    (folder / "site.yaml").write_text(yaml.safe_dump({**file, **(changes or {})}), encoding="utf-8")
    return folder


def build_job(models: Path, **changes: Any) -> Job:
    """A small job for the models; `changes` go into its sections, for example `train={"rounds": 2}` or `seed=3`."""
    cards = {
        "old_encoder": read_card(models / "old_encoder", EncoderCard).digest,
        "new_encoder": read_card(models / "new_encoder", EncoderCard).digest,
        "task_head": read_card(models / "task_head", HeadCard).digest,
    }
    plain: dict[str, Any] = {
        "schema": "fedbridge.job/1",
        "name": "small",
        "models": cards,
        "selection": {"windows_per_patient": 6, "folds": 3},
        "bridge": {"rank": RANK, "prototypes": PROTOTYPES},
        "train": {
            "rounds": 3,
            "local_steps": 4,
            "patients_per_batch": 4,
            "windows_per_patient": 3,
            "learning_rate": 1e-2,
        },
    }
    for key, value in changes.items():
        plain[key] = {**plain.get(key, {}), **value} if isinstance(value, dict) else value
    return Job.model_validate(plain)


def bridge_shape(rank: int = RANK, prototypes: int = PROTOTYPES) -> BridgeShape:
    """Sizes of the small models' bridge, the same at all positions."""
    return BridgeShape(WIDTH, rank, TOKENS, prototypes, WIDTH)


def start_arrays(seed: int = 0, rank: int = RANK, prototypes: int = PROTOTYPES) -> dict[str, NDArray[np.float32]]:
    """A broadcast bridge for the small models."""
    return initial_arrays(bridge_shape(rank, prototypes), seed)


def ask(
    site: Path,
    job: Job | str,
    message_type: str,
    config: Mapping[str, Any] | None = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    *,
    records: Mapping[str, Any] | None = None,
    node_config: Mapping[str, Any] | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> Message:
    """`send`, after a node that has a site of its own has accepted the study, as far as site and job can be read."""
    node = dict(node_config if node_config is not None else {"site": str(site)})
    text = job if isinstance(job, str) else job_text(job)
    if "site" in node:
        with suppress(ConfigError, SiteError):
            agree_once(Path(node["site"]), text)
    return send(node, text, message_type, config, arrays, records=records, run_config=run_config)


def send(
    node_config: Mapping[str, Any],
    job: str,
    message_type: str,
    config: Mapping[str, Any] | None = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    *,
    records: Mapping[str, Any] | None = None,
    run_config: Mapping[str, Any] | None = None,
) -> Message:
    """One message to the ClientApp of a node, and its reply. `records` are put beside `config`."""
    from client.app import app

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
    content = RecordDict({"config": ConfigRecord(dict(config or {}))})
    if arrays is not None:
        content["arrays"] = ArrayRecord({key: Array(value) for key, value in arrays.items()})
    for key, record in (records or {}).items():
        content[key] = record
    message = Message(content, 12, message_type)
    message.metadata.__dict__["_message_id"] = secrets.token_hex(8)
    return app(message, Context(7, 12, dict(node_config), RecordDict(), {"job": job, **(run_config or {})}))


def train_config(round_: int = 1, m: int = 2, l: int = 1) -> dict[str, Any]:  # noqa: E741
    """The `config` of a train message."""
    return {"round": round_, "input-position": m, "output-position": l}


KINDS: dict[str, dict[str, Any]] = {
    "query.describe": {},
    "query.probe": {},
    "query.similarity": {"input-position": 1},
    "train": train_config(),
    "evaluate": {**train_config(3), "split": "test"},
}
"""A sound message of each type, for the job of `build_job`."""


def arrays_for(kind: str) -> dict[str, NDArray[np.float32]] | None:
    """The arrays of a sound message of that type."""
    return start_arrays() if kind in ("train", "evaluate") else None


def code(small: Small, kind: str, config: dict[str, Any] | None = None, site: Path | None = None, **more: Any) -> int:
    """The code of the error with which the site answers; 0 where it answers with content."""
    wanted = KINDS[kind] if config is None else config
    arrays = more.pop("arrays", arrays_for(kind))
    job = more.pop("job", build_job(small.models))
    reply = ask(site or small.site, job, kind, wanted, arrays, **more)
    if reply.has_error():
        assert reply.error.reason == SENTENCES[ReasonCode(reply.error.code)]
        return reply.error.code
    return 0


def _encoder(modality: Modality) -> CompactEncoder:
    rate = RATES[modality]
    channel = "I" if modality == "ECG" else "P"
    window = WindowSpec(modality=modality, channels=(channel,), rate_hz=rate, samples=rate * WINDOW_SECONDS)
    return CompactEncoder(window, CompactArchitecture(width=WIDTH, blocks=BLOCKS[modality], heads=2, tokens=TOKENS))


def _windows(modality: Modality, states: NDArray[np.int64], rng: np.random.Generator) -> torch.Tensor:
    """One normalised window `(1, samples)` for each state."""
    x = np.stack([_signal(modality, np.full(WINDOW_SECONDS, state), rng) for state in states])[:, None]
    return torch.from_numpy(((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)).astype(np.float32))


def _fit(
    encoder: CompactEncoder,
    readout: torch.nn.Module,
    windows: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    """A few steps of Adam on the encoder and a readout of its pooled final tokens."""
    optimiser = torch.optim.Adam([*encoder.parameters(), *readout.parameters()], lr=3e-3)
    for rows in torch.randint(len(windows), (STEPS, 48)):
        optimiser.zero_grad()
        loss(readout(encoder(windows[rows]).mean(1)), rows).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def _signal(modality: str, states: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """A rhythm that follows the states second by second: narrow peaks for ECG, a round wave for PPG, and noise."""
    rate = RATES[modality]  # type: ignore[index]
    jitter = rng.normal(0, 0.15)
    frequency = np.repeat(np.take(RHYTHM_HZ, states) + jitter, rate)
    phase = 2 * np.pi * (np.cumsum(frequency) / rate + rng.uniform())
    wave = np.exp(8 * (np.cos(phase) - 1)) if modality == "ECG" else np.sin(phase) + 0.3 * np.sin(2 * phase + 1)
    return (wave + rng.normal(0, NOISE, wave.shape)).astype(np.float32)


def _reader_options(labels: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "subject": "subject",
        "signals": {
            "ECG": {"array": "ECG", "rate": RATES["ECG"], "channels": ["I"]},
            "PPG": {"array": "PPG", "rate": RATES["PPG"], "channels": ["P"]},
        },
    }
    if labels:
        options["label"] = {"array": "label", "rate": 1, "names": "names"}
    return options

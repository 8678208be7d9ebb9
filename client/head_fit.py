"""`fedbridge-site head fit`: a task head, or the whole old model, on the site's own labelled patients.

What it writes is meant to leave the site, and no mechanism protects the patients that it was fitted on. So the policy
must allow it, the audit log tells it before the folder has its name, and the cards say on whom it was fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge.encoders.cards import WEIGHTS, EncoderCard, HeadCard
from bridge.encoders.loading import load_encoder
from bridge.encoders.pretrain import Progress
from bridge.errors import WeightsError, WeightsStorageError
from bridge.files import cause, require_free, whole_folder
from bridge.head_files import ENCODER, HEAD
from bridge.head_fit import FittedHead, HeadSettings, fit_head, save_fitted
from bridge.messages import ReasonCode
from client.audit import AuditLog, Entry
from client.errors import ModelsError, PolicyError, SiteFileError
from client.forget import withdrawn
from client.policy import Policy, load_policy
from client.site import Site
from client.windowing import WindowTable, windows_of

NO_MECHANISM = "none: fitted on patients without a privacy mechanism"
_COUNTS = ("windows", "windows_by_class")
_METRICS = ("held_back_balanced_accuracy", "held_back_interval", "better_than_chance", "sentence")


@dataclass(frozen=True)
class SiteFit:
    """What was fitted, the cards that were written, and how many patients had labels but have withdrawn."""

    fitted: FittedHead
    encoder: EncoderCard
    head: HeadCard
    withdrawn: int


def fit_site_head(
    site: Site, out: Path, settings: HeadSettings, *, seed: int = 0, progress: Progress | None = None
) -> SiteFit:
    """Fit on the labelled windows of the site's pair patients and write `out/task_head` and, where the whole model is
    trained, `out/old_encoder`: whole or not at all.

    Patients who withdrew are left out; validation and test patients are never read. Counts of windows stay out of the
    cards, and so do metrics where fewer than the policy's `minimum_group` patients were held back.

    Raises `PolicyError` where the policy does not allow it or there are fewer patients than its `minimum_patients`,
    `SiteFileError` where the site has no labels, `ModelsError`, `NoWindowsError`, `SelectionError` and `ConfigError` as
    `fit_head` does, and `WeightsStorageError` and `AuditError` where nothing can be written.
    """
    policy = load_policy(site.policy_path)
    policy.demand_fit()
    require_free(out)
    classes = _classes(site)
    card = site.old_card
    found = windows_of(site, "pair", roles=("old",))
    assert found.old is not None
    gone = withdrawn(site)
    stays = {patient: patient not in gone for patient in set(found.table.patients.tolist())}
    rows = np.array([stays[patient] for patient in found.table.patients.tolist()]) & (found.table.labels >= 0)
    table = found.table.take(rows)
    _require_patients(table, policy)
    try:
        encoder = load_encoder(site.model_folder("old_encoder"))
    except WeightsError as error:
        raise ModelsError(error.what, why=error.why, fix=error.fix) from error
    fitted = fit_head(
        encoder,
        found.old[rows],
        table.labels,
        np.asarray(table.patients, np.str_),
        len(classes),
        settings,
        seed=seed,
        compute=site.compute,
        progress=progress,
    )
    cards = _write(site, fitted, card, out, classes, policy, seed)
    return SiteFit(fitted, *cards, withdrawn=sum(not each for each in stays.values()))


def _classes(site: Site) -> tuple[str, ...]:
    if site.file.labels.source == "none":
        raise SiteFileError(
            f"the site file of '{site.name}' names no labels",
            why="labels.source is none",
            fix="name the source of the labels and their classes under the key 'labels'",
        )
    return site.file.labels.classes


def _require_patients(table: WindowTable, policy: Policy) -> None:
    patients = len(set(table.patients.tolist()))
    if patients < policy.minimum_patients:
        raise PolicyError(
            ReasonCode.TOO_FEW_PATIENTS,
            f"{patients} patient(s) of the split 'pair' have labelled windows and have not withdrawn",
            why=f"the policy's minimum_patients is {policy.minimum_patients}",
            fix="label more patients, or lower minimum_patients if the hospital agrees",
        )


def _write(
    site: Site,
    fitted: FittedHead,
    card: EncoderCard,
    out: Path,
    classes: tuple[str, ...],
    policy: Policy,
    seed: int,
) -> tuple[EncoderCard, HeadCard]:
    """The folder under another name, the audit log's entries, then the folder's own name."""
    training = {
        "data": f"labelled pair patients of the site {site.name}",
        "public": False,
        "private_patients": fitted.patients,
        "fitted_on": f"patients of {site.name}",
        "privacy": NO_MECHANISM,
        "seed": seed,
    }
    left_out = (*_COUNTS, *(_METRICS if fitted.held_back < policy.minimum_group else ()))
    try:
        with whole_folder(out) as partial:
            cards = save_fitted(fitted, card, partial, classes=classes, training=training, left_out=left_out)
            AuditLog(site.audit_path).append(_entries(fitted, partial, *cards))
            partial.chmod(0o755)
    except OSError as error:
        raise WeightsStorageError(
            f"{out}: the fitted models can't be written",
            why=cause(error),
            fix="free space, or name a folder that can be written; nothing was left behind",
        ) from error
    return cards


def _entries(fitted: FittedHead, folder: Path, encoder: EncoderCard, head: HeadCard) -> list[Entry]:
    written = {HEAD: head.digest}
    if fitted.settings.train == "whole":
        written = {ENCODER: encoder.digest, **written}
    return [
        Entry(
            run="",
            message="",
            event="fitted",
            item=name,
            bytes=(folder / name / WEIGHTS).stat().st_size,
            sha256=digest,
            purpose=f"to be handed out: fitted on {fitted.patients} patients of this site, without a privacy mechanism",
        )
        for name, digest in written.items()
    ]

"""A rehearsal from study file to record: judge, deal out, run, list what would leave and what it would cost."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from bridge.encoders.cards import WEIGHTS
from bridge.errors import FedbridgeError
from bridge.files import write_whole
from bridge.installation import check_installation
from bridge.job import job_text
from bridge.run_config import Value
from bridge.services import flower_environment
from bridge.study.archive import Study, open_study
from bridge.study.manifest import MODEL_NAMES
from client.session import house
from client.site import Site
from server.initialisation import PUBLIC_VECTORS
from simulations.errors import RehearsalError
from simulations.progress import Progress, following, no_progress
from simulations.rehearse.house import House
from simulations.rehearse.judge import judge
from simulations.rehearse.place import check_free, workplace
from simulations.rehearse.record import Rehearsal
from simulations.rehearse.sites import SITES, names_of, rehearsed_job, write_sites
from simulations.rehearse.summary import summary
from simulations.rehearse.tell import record_of
from simulations.rehearse.workers import Workers

REHEARSAL_JSON, SUMMARY = "rehearsal.json", "summary.txt"


def rehearse(
    path: Path, site_path: Path, out: Path, *, pretend: int = 3, progress: Progress = no_progress
) -> Rehearsal:
    """Rehearse the study in the file `path` at a site, into the new folder `out`, and return its record.

    Nothing of the site is changed, and nothing is asked of any other machine. Raises what `accept` would refuse;
    `RehearsalError` where the study can't be rehearsed here or the site would not take part in it, with its code;
    `RunFolderError` where `out` can't be written; and what stopped the run. Then `out` is not made.
    """
    check_installation()
    check_free(out)
    site, policy = house(site_path)
    with open_study(path) as study:
        names = names_of(site.name, study.job, pretend)
        with workplace(out) as place:
            judge(site, policy, study, place / "judge")
            models = _models(site, study, place / "models")
            sites = write_sites(site, names, models, place)
            text = job_text(rehearsed_job(study.job, names))
            record = record_of(study, sites, policy, _run(text, models, sites, place, progress))
            write_whole(place / "out" / REHEARSAL_JSON, record.model_dump_json(by_alias=True, indent=1) + "\n")
            write_whole(place / "out" / SUMMARY, summary(record))
    return record


def _models(site: Site, study: Study, folder: Path) -> Path:
    """The study's models; weights that it does not include are linked from the site's own model folders."""
    study.extract_models(folder)
    for name in MODEL_NAMES:
        if not study.manifest.models[name].included:
            (folder / name / WEIGHTS).symlink_to((site.model_folder(name) / WEIGHTS).resolve())
    public = folder / PUBLIC_VECTORS
    if not public.exists() and site.file.models is not None:
        beside = site.model_folder("old_encoder").parent / PUBLIC_VECTORS
        if beside.is_file():
            public.symlink_to(beside.resolve())
    return folder


def _run(text: str, models: Path, sites: list[Site], place: Path, progress: Progress) -> House:
    """The whole run with the real ServerApp, one message at a time, so that none disturbs another's figures."""
    from server.app import app as server_app
    from simulations.local_grid import run_local

    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_folder = place / "run"
    values: dict[str, Value] = {
        "job": text,
        "run-folder": str(run_folder),
        "models-folder": str(models),
        "simulation-folder": str(place / SITES),
        "run-key": secrets.token_hex(16),
        "engine": "local",
        "resume": False,
    }
    workers = Workers(place / "work", flower_environment(place / "flower"))
    answering = House(sites[0], workers, place / "out")
    try:
        with following(run_folder, progress):
            run_local(server_app, answering, values, len(sites), workers=1)
    except FedbridgeError as error:
        raise _stopped(answering, workers, error) from error
    finally:
        answering.close()
    return answering


def _stopped(answering: House, workers: Workers, error: FedbridgeError) -> FedbridgeError:
    """What is behind a run that ended: the site's own answer, a process that died, or the error itself."""
    if answering.stopped is not None:
        words = workers.last_words() if not isinstance(answering.stopped, RehearsalError) else ""
        if words:
            answering.stopped.why += f"; it said: {words}"
        return answering.stopped
    refused = [reply for reply in answering.replies if reply.outcome != "OK"]
    if not refused:
        return error
    last = refused[-1]
    return RehearsalError(
        f"the run can't go on without the site's answer to '{last.message}': {last.outcome}",
        why=last.why or error.what,
        fix="correct what it names; docs/reference/errors.md explains each code",
    )

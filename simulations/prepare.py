"""From a configuration to real site folders, models and a job: what a hospital and a coordinator would have on disk.

    DIR/sites/site-<i>/   site.yaml, policy.yaml, labels.csv, recordings/ (links, or copies)
    DIR/models/           old_encoder, new_encoder, task_head, public_vectors.safetensors (simulations.models.public)
    DIR/job.yaml          the job that every site is asked to do
    DIR/app/, DIR/run-config.toml, DIR/federation-config.toml   the same for `flwr run`
    DIR/study.yaml        instead of those three, where the site folders stand alone: a study to build
    DIR/config.yaml       the resolved configuration

Everything is made in a folder beside DIR and renamed at the end, so DIR is whole or not there at all.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from bridge.bundle import build_app
from bridge.config import load_model
from bridge.encoders.cards import EncoderCard, HeadCard, read_card
from bridge.job import Job, Models, job_text
from bridge.privacy.calibration import resolved
from bridge.run_config import RUN_CONFIG_DEFAULTS, Value, toml_text
from client.errors import NoWindowsError
from client.site_file import ModelsSection, SiteFile
from server.errors import RunFolderError
from simulations.config import DataConfig, SimulationConfig
from simulations.federation import federation_config
from simulations.hospital_files import (
    MODELS,
    SITES,
    common_keys,
    labels_section,
    signal_section,
    site_names,
    write_sites,
)
from simulations.models.make import make_models
from simulations.models.places import HEAD, NEW, OLD
from simulations.models.reading import site_of
from simulations.partitions import hospitals
from simulations.progress import Progress
from simulations.source import Source
from simulations.split import Split, split_patients

CONFIG, JOB, STUDY, APP = "config.yaml", "job.yaml", "study.yaml", "app"
RUN_CONFIG, FEDERATION_CONFIG = "run-config.toml", "federation-config.toml"
RUN_KEY = "run-key"
"""Names this very run in the sites' privacy ledgers: the same after a resume, another for the next run."""


def prepare(
    config: SimulationConfig,
    out: Path,
    *,
    copy: bool = False,
    standalone: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Make the folder `out` of a study and return it.

    Models are made from the public patients and from published files, or taken from the cache. `copy` puts copies of
    the recordings into the site folders, links otherwise; `standalone` makes site folders that may be carried to
    machines of their own, and a study to build. Raises `RunFolderError` where `out` exists and holds something, or
    can't be written, and what source, split, partition and the making of models raise; then nothing is left behind.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - a link is kept as the user named it
    _check_free(out)
    source = load_source(config.data, progress)
    split = split_patients(source, config.split)
    dealt = hospitals(source, split, config.partition, config.seed)
    with _whole_or_not(out) as folder:
        _write_text(folder / CONFIG, config.text())
        make_models(config, source, split, folder / MODELS, progress)
        _write_examples(source, split, config, folder)
        write_sites(source, dealt, config, folder, copy=copy, standalone=standalone, progress=progress)
        job = _write_job(config, folder, len(dealt))
        if standalone:
            _write_text(folder / STUDY, study_text(job))
        else:
            _write_flower(config, folder, out, len(dealt))
    return out


def load_source(data: DataConfig, progress: Progress) -> Source:
    """The recordings that a configuration names; the built-in cohort is made where it is not in the cache."""
    if data.source == "builtin":
        from simulations.cohort import built_in_cohort

        return built_in_cohort(data.builtin, progress=lambda done, total: progress("recordings", done, total))
    if data.source == "cinc2015":
        from simulations.datasets.cinc2015 import cinc2015_source

        assert data.cinc2015 is not None
        return cinc2015_source(data.cinc2015, progress)
    if data.source == "eegmat":
        from simulations.datasets.eegmat import eegmat_source

        assert data.eegmat is not None
        return eegmat_source(data.eegmat)
    if data.source == "isruc":
        from simulations.datasets.isruc import isruc_source

        assert data.isruc is not None
        return isruc_source(data.isruc)
    if data.source == "fog":
        from simulations.datasets.fog import fog_source

        assert data.fog is not None
        return fog_source(data.fog)
    from simulations.datasets.wesad import wesad_source

    assert data.wesad is not None
    return wesad_source(data.wesad)


def read_config(folder: Path) -> SimulationConfig:
    """The configuration of a prepared folder; raises `ConfigError` where it is none."""
    return load_model(folder / CONFIG, SimulationConfig)


def read_job(folder: Path) -> Job:
    """The job of a prepared folder; raises `ConfigError` where it is none."""
    return load_model(folder / JOB, Job)


def site_folders(folder: Path) -> list[Path]:
    """The site folders of a prepared folder, in the order of their partition."""
    return sorted((folder / SITES).glob("site-*"), key=lambda path: int(path.name.removeprefix("site-")))


def run_config(folder: Path, *, engine: str, resume: bool) -> dict[str, Value]:
    """The flat run config of a prepared folder; every path is absolute."""
    values: dict[str, Value] = {
        "job": (folder / JOB).read_text(encoding="utf-8"),
        "run-folder": str(folder),
        "models-folder": str(folder / MODELS),
        "simulation-folder": str(folder / SITES),
        "run-key": (folder / RUN_KEY).read_text(encoding="utf-8").strip(),
        "engine": engine,
        "resume": resume,
    }
    assert values.keys() == RUN_CONFIG_DEFAULTS.keys()
    return values


def flwr_command(folder: Path) -> str:
    """The command that starts the prepared study with Flower itself, from an empty folder."""
    quoted = [shlex.quote(str(path)) for path in (folder / APP, folder / RUN_CONFIG, folder / FEDERATION_CONFIG)]
    return (
        f'cd "$(mktemp -d)" && flwr run {quoted[0]} --stream --run-config {quoted[1]} --federation-config {quoted[2]}'
    )


def _write_examples(source: Source, split: Split, config: SimulationConfig, folder: Path) -> None:
    """A few windows for the report; none where nobody may be shown."""
    from server.report.windows import write_example_windows
    from simulations.examples import example_patients, example_windows

    members = example_patients(source, split, made_up=config.data.source == "builtin")
    if not members:
        return
    file = SiteFile(
        site="examples",
        old=signal_section(source, "old"),
        new=signal_section(source, "new"),
        labels=labels_section(source, config.data),
        models=ModelsSection(**{name: folder / MODELS / name for name in (OLD, NEW, HEAD)}),
        **common_keys(source),
    )
    with site_of(file, members) as site, suppress(NoWindowsError):
        write_example_windows(folder, example_windows(site, source.classes))


def _write_job(config: SimulationConfig, folder: Path, sites: int) -> Job:
    models = folder / MODELS
    digests = Models(
        old_encoder=read_card(models / OLD, EncoderCard).digest,
        new_encoder=read_card(models / NEW, EncoderCard).digest,
        task_head=read_card(models / HEAD, HeadCard).digest,
    )
    job = _with_expected(config.job(digests), site_names(sites))
    _write_text(folder / JOB, job_text(resolved(job)))
    return job


def study_text(job: Job) -> str:
    """The study of a job as `fedbridge-server study build` reads it, every key written out; models lie beside it."""
    content = job.model_dump(mode="json", exclude={"schema_", "coordinator", "models"})
    study = {"schema": "fedbridge.study-config/1", "models": {"folder": MODELS}, **content}
    return yaml.safe_dump(study, sort_keys=False, allow_unicode=True)


def _write_flower(config: SimulationConfig, folder: Path, out: Path, sites: int) -> None:
    """App, run key and Flower's two files; their paths name the folder as it will be called."""
    build_app(folder / APP)
    _write_text(folder / RUN_KEY, secrets.token_hex(16) + "\n")
    values = run_config(folder, engine="flower", resume=False)
    values |= {key: str(out / Path(str(values[key])).relative_to(folder)) for key in values if key.endswith("-folder")}
    _write_text(folder / RUN_CONFIG, toml_text(values))
    _write_text(folder / FEDERATION_CONFIG, toml_text(federation_config(sites, config.workers)))


def _with_expected(job: Job, names: tuple[str, ...]) -> Job:
    """The job with the sites that it expects, so that the server need not wait for more to come."""
    if job.sites.expected:
        return job
    expected = tuple(job.sites.weights) or names
    return job.model_copy(update={"sites": job.sites.model_copy(update={"expected": expected})})


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(
            f"{out}: is not an empty folder",
            why="a study is prepared in a folder of its own",
            fix="name another --out, or remove it",
        )


@contextmanager
def _whole_or_not(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when the block has ended well, and is gone otherwise."""
    partial = out.parent / f".{out.name}.preparing"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(out: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"{out}: can't be written", why=error.strerror or str(error), fix="free space or choose a writable --out"
    )

"""One run from its first message to the exported bridge: describe, select, train, evaluate, export."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from flwr.serverapp import Grid

from bridge.chain import BRIDGE as BRIDGE_FILE
from bridge.chain import export_chain
from bridge.errors import ConfigError
from bridge.hashing import sha256_json
from bridge.job import Job, parse_job
from bridge.prototype import Arrays
from server.book import Engine, RunBook
from server.checkpoint import Checkpoint, CheckpointFolder
from server.closed_form import solved_bridge
from server.errors import RunFolderError
from server.evaluation import evaluation_record, pooled_confusions, pooled_sums, private_evaluation_record
from server.events import EventLog, now
from server.exchange import Exchange
from server.initialisation import first_broadcast
from server.models import FrozenModels, read_models
from server.record import BridgeRecord
from server.releases import Releases
from server.roster import Describing
from server.rounds import Training
from server.runfolder import BRIDGE, CHECKPOINTS, opened, where_it_stands
from server.selection import select
from server.statement import build_statement, write_statement
from server.strategies import Aggregator, cautions


@dataclass(frozen=True)
class Request:
    """What the run config asks of the coordinator."""

    job: Job
    run_folder: Path
    models_folder: Path
    engine: Engine
    resume: bool

    @classmethod
    def of(cls, run_config: dict[str, str | int | float | bool]) -> Request:
        """From Flower's flat run config; raises `ConfigError` that names the key."""
        folders = {key: Path(str(run_config.get(key, ""))) for key in ("run-folder", "models-folder")}
        for key, folder in folders.items():
            if not folder.is_absolute():
                raise ConfigError(
                    f"run config: '{key}' is '{run_config.get(key, '')}'",
                    why="the coordinator's working folder is not yours, so an absolute path is needed",
                    fix="name the whole path",
                )
        engine, resume = str(run_config.get("engine", "deployment")), run_config.get("resume", False)
        if engine not in get_args(Engine) or not isinstance(resume, bool):
            raise ConfigError(
                f"run config: engine '{engine}', resume {resume!r}",
                why=f"engine is one of {', '.join(get_args(Engine))}; resume is true or false",
                fix="correct the run config",
            )
        job = parse_job(str(run_config.get("job", "")))
        return cls(job, folders["run-folder"], folders["models-folder"], cast(Engine, engine), resume)


def run(grid: Grid, request: Request, run_id: str) -> None:
    """Run the job to its end, or raise.

    Whatever is raised once the run folder is taken is written to `run.json` (status failed) and `log.jsonl` first.
    """
    models = read_models(request.models_folder, request.job)
    with opened(request.run_folder, request.resume) as folder:
        job_sha256 = sha256_json(request.job.model_dump(mode="json", by_alias=True))
        checkpoint: Checkpoint | None = None
        damaged: list[str] = []
        done = False
        if request.resume:
            checkpoint, damaged, done = where_it_stands(folder, request.job, job_sha256)
        with EventLog(folder) as log:
            if done:
                log.emit("note", text="the run is complete already: nothing to do")
                return
            for name in damaged:
                log.emit("note", text=f"checkpoint {name} is damaged and was passed over")
            book = RunBook(
                folder, run_id=run_id, job=request.job, engine=request.engine, models=models.cards(), started=now()
            )
            try:
                _Run(grid, request.job, job_sha256, models, book, log).go(checkpoint)
            except BaseException as error:
                text = _what_stopped(error)
                # A full disk may be the very reason: what stopped the run is raised, not that it can't be noted.
                with suppress(RunFolderError):
                    log.emit("failed", error=text)
                with suppress(RunFolderError):
                    book.save("failed", text)
                raise


def _what_stopped(error: BaseException) -> str:
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "the run's process was told to end: by `fedbridge-server end`, by the system, or since its executor died"
    return str(error) or type(error).__name__


class _Run:
    def __init__(
        self, grid: Grid, job: Job, job_sha256: str, models: FrozenModels, book: RunBook, log: EventLog
    ) -> None:
        self._grid, self._job, self._job_sha256, self._models = grid, job, job_sha256, models
        self._book, self._log = book, log
        self._exchange = Exchange(grid, job, book, log)
        self._releases = Releases(book.folder, job)

    def go(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            self._book.restore(checkpoint.progress, checkpoint.round)
        self._book.save()
        write_statement(self._book.folder, build_statement(self._job, self._book.record("running")))
        self._exchange.roster = Describing(self._grid, self._job, self._book, self._log).run()
        training = self._begin() if checkpoint is None else self._resume(checkpoint)
        for text in cautions(self._job.strategy, len(self._exchange.roster)):
            self._log.emit("note", text=text)
        kept_round, kept = training.run()
        if self._job.evaluate.final:
            self._evaluate(training, kept, kept_round)
        self._export(training, kept, kept_round)
        write_statement(self._book.folder, build_statement(self._job, self._book.record("completed")))
        self._book.save("completed")
        seconds = None if self._job.privacy.private else round(self._book.seconds, 3)
        self._log.emit("finished", round=kept_round, seconds=seconds)

    def _evaluate(self, training: Training, kept: Arrays, kept_round: int) -> None:
        classes, common = self._models.task_head.classes, (self._exchange, self._log)
        if self._job.privacy.private:
            sums = pooled_sums(
                *common,
                training.selection,
                training.dimensions,
                kept,
                kept_round,
                "test",
                self._job,
                self._releases,
                self._job.sites.minimum,
            )
            self._book.evaluation = private_evaluation_record(self._job, sums, classes, self._job.seed)
            return
        pooled = pooled_confusions(
            *common, training.selection, training.dimensions, kept, kept_round, "test", self._job.sites.minimum
        )
        self._book.evaluation = evaluation_record(pooled, classes)

    def _begin(self) -> Training:
        selection = select(self._exchange, self._job, self._models, self._log, self._releases)
        self._book.selection = selection
        positions = selection.input_position, selection.output_position
        shape = self._models.bridge_shape(self._job, positions)
        arrays = first_broadcast(self._job, shape, positions, self._models.folder)
        if self._job.train.solves:
            arrays = solved_bridge(
                self._exchange, self._job, self._models, selection, arrays, self._log, self._releases
            )
        training = self._training(arrays)
        training.checkpoint()
        return training

    def _resume(self, checkpoint: Checkpoint) -> Training:
        training = self._training(checkpoint.arrays)
        training.aggregator.restore(checkpoint.optimiser)
        training.round, training.best = checkpoint.round, checkpoint.best
        self._log.emit("note", text=f"resumed after round {checkpoint.round} of {self._job.rounds}")
        return training

    def _training(self, arrays: Arrays) -> Training:
        selection = self._book.selection
        assert selection is not None  # chosen, or restored from the checkpoint
        positions = selection.input_position, selection.output_position
        return Training(
            job=self._job,
            job_sha256=self._job_sha256,
            checkpoints=CheckpointFolder(self._book.folder / CHECKPOINTS, always_sync=self._job.privacy.private),
            exchange=self._exchange,
            book=self._book,
            log=self._log,
            releases=self._releases,
            selection=selection,
            dimensions=self._models.dimensions(self._job, positions),
            arrays=arrays,
            aggregator=Aggregator(self._job.strategy),
        )

    def _export(self, training: Training, kept: Arrays, kept_round: int) -> None:
        positions = training.selection.input_position, training.selection.output_position
        self._log.emit("export", state="started")
        manifest = export_chain(
            self._book.folder / BRIDGE,
            models=self._models.folder,
            bridge=kept,
            shape=self._models.bridge_shape(self._job, positions),
            positions=positions,
            job_name=self._job.name,
            kept_round=kept_round,
        )
        self._book.bridge = BridgeRecord(
            parameters=manifest.parameters,
            rank=self._job.bridge.rank,
            prototypes=self._job.bridge.prototypes,
            sha256=manifest.files[BRIDGE_FILE],
            kept_round=kept_round,
        )
        self._log.emit("export", state="done", parameters=manifest.parameters)

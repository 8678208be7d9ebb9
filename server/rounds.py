"""Training: broadcast, local updates, aggregate, judge, checkpoint; round by round, from wherever a run stands."""

from __future__ import annotations

import time
from dataclasses import dataclass

from bridge.job import Job
from bridge.messages import TRAIN, Dimensions
from bridge.privacy import Plan, mechanism
from bridge.prototype import Arrays
from server.book import RunBook
from server.checkpoint import Best, Checkpoint, CheckpointFolder
from server.errors import RunError
from server.evaluation import criterion, not_permitted, pooled_confusions, pooled_sums, private_criterion
from server.events import EventLog
from server.exchange import Answers, Exchange, Question
from server.noise import server_noise
from server.record import RoundRecord, SelectionRecord
from server.releases import Releases
from server.replies import Answer, Expected
from server.strategies import Aggregator


@dataclass
class Training:
    """One run's training state and its steps.

    `arrays` is the next broadcast, `round` the last counted one, `best` the best bridge so far where the job keeps it.
    """

    job: Job
    job_sha256: str
    checkpoints: CheckpointFolder
    exchange: Exchange
    book: RunBook
    log: EventLog
    releases: Releases
    selection: SelectionRecord
    dimensions: Dimensions
    arrays: Arrays
    aggregator: Aggregator
    round: int = 0
    best: Best | None = None

    def run(self) -> tuple[int, Arrays]:
        """Train to the job's last round; the kept bridge and its round.

        Raises `RunError` where a round can't get enough good replies or the criterion is not permitted, after a
        checkpoint that says so.
        """
        while self.round < self.job.rounds:
            moments = self.aggregator.state()
            try:
                record = self._one_round(self.round + 1)
            except RunError as error:
                self.aggregator.restore(moments)
                self.checkpoint(stopped=error.what)
                raise
            self.checkpoint()
            self.log.emit("round", rounds=self.job.rounds, **_numbers(record))
            self.book.save()
        if self.job.train.keep == "best":
            assert self.best is not None  # the last round is always judged
            return self.best.round, self.best.arrays
        return self.round, self.arrays

    def checkpoint(self, stopped: str = "") -> None:
        """Save the state as it is now."""
        checkpoint = Checkpoint(
            round=self.round,
            job_sha256=self.job_sha256,
            arrays=self.arrays,
            optimiser=self.aggregator.state(),
            best=self.best,
            progress=self.book.progress(),
            stopped=stopped,
        )
        path = self.checkpoints.save(checkpoint)
        if stopped or self.round == 0:
            self.log.emit("checkpoint", round=self.round, file=path.name, **({"stopped": stopped} if stopped else {}))

    def _one_round(self, round_: int) -> RoundRecord:
        started = time.monotonic()
        answers = self.exchange.ask_enough(self._question(round_))
        updates = {site: self._update(answer) for site, answer in answers.good.items()}
        weights = {site: self.job.sites.weight(site) for site in answers.good}
        # Under `central` the noise comes first: nothing below sees a site's sum.
        noise = server_noise(self.job, "training", round_)
        seen, shares = mechanism(self.job.privacy.mechanism).aggregate(updates, weights, Plan.of(self.job), noise)
        trained = {name: self.arrays[name] for name in self._trained}
        arrays = self.arrays | self.aggregator.aggregate(round_, trained, seen, shares)
        loss = _loss(answers, weights)
        judged = self._judge(round_, arrays, loss)
        self.arrays, self.round = arrays, round_
        record = RoundRecord(
            round=round_,
            loss=loss,
            criterion=judged,
            sites=list(answers.good),
            bytes_up=answers.bytes_up,
            bytes_down=answers.bytes_down,
            # How long a round took depends on how many patients were drawn.
            seconds=None if self.job.privacy.private else round(time.monotonic() - started, 4),
        )
        self.book.add_round(record)
        return record

    def _question(self, round_: int) -> Question:
        optional = () if self.job.privacy.private else ("train_loss",)
        items = (*(f"update.{name}" for name in self._trained), "weight")
        expected = Expected(items, optional=optional, dimensions=self.dimensions)
        config = {
            "round": round_,
            "input-position": self.selection.input_position,
            "output-position": self.selection.output_position,
        }
        return Question(f"round {round_}", TRAIN, expected, config, self.arrays)

    @property
    def _trained(self) -> tuple[str, ...]:
        assert self.dimensions.bridge is not None
        return self.dimensions.bridge.trained

    def _update(self, answer: Answer) -> Arrays:
        return {name: answer.values[f"update.{name}"] for name in self._trained}

    def _private_criterion(self, arrays: Arrays, round_: int, at_least: int) -> float | None:
        """The criterion from noised sums over validation patients: an own release, on an own budget."""
        sums = pooled_sums(
            self.exchange,
            self.log,
            self.selection,
            self.dimensions,
            arrays,
            round_,
            "validation",
            self.job,
            self.releases,
            at_least,
        )
        return private_criterion(self.job, sums)

    def _judge(self, round_: int, arrays: Arrays, loss: float | None) -> float | None:
        """The criterion of the bridge after this round where it is due; remembers the best, the earlier of equals."""
        if not self.job.judges(round_):
            return None
        train, keep_best = self.job.train, self.job.train.keep == "best"
        value, lost = loss, {}
        if self.job.privacy.private:
            value = self._private_criterion(arrays, round_, int(keep_best))
        elif train.criterion != "train_loss":
            pooled = pooled_confusions(
                self.exchange, self.log, self.selection, self.dimensions, arrays, round_, "validation", int(keep_best)
            )
            value, lost = criterion(self.job, pooled), pooled.lost
        if not keep_best:
            return value
        if value is None:
            raise not_permitted(self.job, round_, lost)
        sign = -1.0 if train.criterion == "train_loss" else 1.0
        if self.best is None or sign * value > sign * self.best.criterion:
            self.best = Best(round_, value, arrays)
        return value


def _loss(answers: Answers, weights: dict[str, float]) -> float | None:
    """Weighted mean of the losses that sites permitted; None where none did."""
    told = {site: a.values["train_loss"] for site, a in answers.good.items() if "train_loss" in a.values}
    if not told:
        return None
    return float(sum(weights[site] * loss for site, loss in told.items()) / sum(weights[site] for site in told))


def _numbers(record: RoundRecord) -> dict[str, object]:
    return {
        "round": record.round,
        "loss": record.loss,
        "criterion": record.criterion,
        "sites": len(record.sites),
        "seconds": record.seconds,
    }

"""One message at a site: open the site, judge the job, then the message, and only then touch data."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Context, Message

from bridge.job import Job
from bridge.messages import Dimensions, ReasonCode
from client.audit import AuditLog
from client.errors import (
    JobError,
    ModelsDifferError,
    NotAcceptedError,
    NoWindowsError,
    PolicyError,
    SiteFileError,
)
from client.locate import is_simulated, locate_site
from client.outbox import Outbox
from client.policy import Policy, load_policy
from client.requests import Request, read_arrays, read_job, read_request
from client.site import Site, open_site
from client.site_file import Split

if TYPE_CHECKING:
    from client.features import FeatureSet
    from client.study.record import Accepted


WATCH_SECONDS = 1.0
"""How long a computation may go on after its study was withdrawn."""

RUN_KEY = "run-key"
RUN_KEY_PATTERN = re.compile(r"^[0-9a-f]{32}\Z")


@dataclass(frozen=True)
class Deadline:
    """How long one message may take, by the policy, and what may stop it; the work asks at every step."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    interrupt: Callable[[], None] = lambda: None
    """Raises where the work must end now."""

    def check(self) -> None:
        """Raise `PolicyError` (TOO_SLOW) where the time is over, and whatever `interrupt` raises."""
        self.interrupt()
        if time.monotonic() - self.started > self.seconds:
            raise PolicyError(
                ReasonCode.TOO_SLOW,
                f"the message took longer than {self.seconds:g} s",
                why="the policy's max_seconds_per_message is over",
                fix="raise it, or let the coordinator ask again: features that were computed are kept",
            )


@dataclass(frozen=True)
class Session:
    """A site that has judged the job and found nothing against it. `dimensions` lacks the bridge's sizes.

    `run_key` names the run across restarts of the coordinator; it is what the ledger books under. `study` is what the
    hospital accepted; a simulation's pretend site has none.
    """

    site: Site
    policy: Policy
    job: Job
    dimensions: Dimensions
    deadline: Deadline
    run_key: str = ""
    study: Accepted | None = None

    def request(self, message: Message) -> Request:
        """The checked message, with its arrays where it has some, counted where a study says how often it may come.

        Raises `MessageError`, and `NotAcceptedError` (ASKED_TOO_OFTEN).
        """
        request = read_request(message, self.job, self.policy, self.dimensions)
        if request.has_bridge:
            dimensions = self.dimensions_at(request)
            request = replace(request, arrays=read_arrays(message, dimensions), shape=dimensions.bridge)
        if self.study is not None:
            from client.study.allowance import Question, take

            take(self.site, self.study, Question(request.message, request.round, request.split))
        return request

    def dimensions_at(self, request: Request) -> Dimensions:
        """The dimensions with the bridge's sizes at the request's positions, where it names both."""
        if not request.has_bridge:
            return self.dimensions
        site = self.site
        return Dimensions.of(self.job, site.old_card, site.new_card, site.head_card, request.positions)

    def pairs(self) -> FeatureSet:
        """The features of the paired windows, once there are patients enough for the site's own minimum.

        Raises `PolicyError` (TOO_FEW_PATIENTS). What the server would like to see is never compared with a count.
        """
        try:
            features = self.features("pair")
            patients = len(np.unique(features.table.patients))
        except NoWindowsError as error:
            raise PolicyError(ReasonCode.TOO_FEW_PATIENTS, error.what, why=error.why, fix=error.fix) from error
        if patients < self.policy.minimum_patients:
            raise PolicyError(
                ReasonCode.TOO_FEW_PATIENTS,
                f"{patients} patients have usable paired windows",
                why=f"the policy's minimum_patients is {self.policy.minimum_patients}",
                fix="run `fedbridge-site check` to see what was rejected, and why",
            )
        return features

    def cohort(self, split: Split) -> FeatureSet | None:
        """The features of a split however few its patients are; None where it has no usable window.

        For private mechanisms, under which nothing that leaves may depend on how many patients there are.
        """
        try:
            return self.features(split)
        except NoWindowsError:
            return None

    def features(self, split: Split) -> FeatureSet:
        """The frozen features of a split, in the time that the policy gives."""
        from client.features import features

        self.deadline.check()
        found = features(self.site, split, lambda done, files: self.deadline.check())
        self.deadline.check()
        return found

    def reply(self, message: Message, request: Request, items: dict[str, Any]) -> Message:
        """The reply with these items, through the outbox."""
        self.deadline.check()
        outbox = Outbox(
            request.message,
            self.dimensions_at(request),
            self.policy,
            AuditLog(self.site.audit_path),
            request.run,
            request.round,
        )
        for name, value in items.items():
            outbox.add(name, value)
        with self.leaving():
            return Message(outbox.reply_content(), reply_to=message)

    def leaving(self) -> AbstractContextManager[None]:
        """While a reply is handed over: nobody withdraws the study. Raises `NotAcceptedError` where that was done."""
        if self.study is None:
            return nullcontext()
        from client.study.acceptance import leaving

        return leaving(self.site, self.study)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While a message is answered: of a study that is withdrawn meanwhile, nothing stays in the cache."""
        try:
            yield
        except NotAcceptedError as error:
            if self.study is not None and error.reason is ReasonCode.STUDY_WITHDRAWN:
                from client.study.withdraw import tidy

                tidy(self.site, self.study.folder)
            raise


def open_house(context: Context) -> tuple[Site, Policy]:
    """The node's site and its policy. Raises `SiteFileError`."""
    return house(locate_site(context))


def house(path: Path) -> tuple[Site, Policy]:
    """A site and its policy, which must be this site's. Raises `SiteFileError`."""
    site = open_site(path)
    policy = load_policy(site.policy_path)
    if policy.site and policy.site != site.name:
        raise SiteFileError(
            f"the policy is for the site '{policy.site}', the site file names '{site.name}'",
            why="a policy holds for one site",
            fix="correct one of the two",
        )
    return site, policy


def admit(site: Site, policy: Policy, context: Context) -> Session:
    """Judge the run's job by the policy, by what the hospital accepted, and by the models that the site holds. Reads no
    recording.

    Raises `JobError`, `PolicyError`, `NotAcceptedError`, `SiteFileError` where the machine can't compute as the site
    file says, `ModelsError` and `ModelsDifferError`, checked in this order.
    """
    deadline = Deadline(policy.max_seconds_per_message)
    job = read_job(context.run_config)
    policy.judge(job)
    run_key = _run_key(job, context)
    study = None
    if not is_simulated(context):
        study = _agreed(site, context)
        deadline = replace(deadline, interrupt=_Watch(study))
    _ = site.compute  # a GPU that is not there should be known before anybody waits for it
    held = {
        "old_encoder": site.old_card.digest,
        "new_encoder": site.new_card.digest,
        "task_head": site.head_card.digest,
    }
    for name, digest in held.items():
        asked = getattr(job.models, name)
        if digest != asked:
            raise ModelsDifferError(
                f"the site's {name} has the digest {digest[:16]}...",
                why=f"the job is about {asked[:16]}...",
                fix="get the model folders of this study from the coordinator",
            )
    dimensions = Dimensions.of(job, site.old_card, site.new_card, site.head_card)
    return Session(site, policy, job, dimensions, deadline, run_key, study)


def _agreed(site: Site, context: Context) -> Accepted:
    """The study that the hospital accepted with this very job and code. Raises `NotAcceptedError`."""
    from client.study.acceptance import admitted
    from client.study.running import running_bundle

    return admitted(site, str(context.run_config["job"]), running_bundle())


class _Watch:
    """Raises where a study was withdrawn, looking once a second at most."""

    def __init__(self, study: Accepted) -> None:
        self._study, self._next = study, 0.0

    def __call__(self) -> None:
        from client.study.acceptance import require_holding

        if time.monotonic() >= self._next:
            require_holding(self._study)
            self._next = time.monotonic() + WATCH_SECONDS


def _run_key(job: Job, context: Context) -> str:
    """The run's name in the ledger; empty where no mechanism needs one. Raises `JobError`."""
    if not job.privacy.private:
        return ""
    if job.privacy.simulation_seed is not None and not is_simulated(context):
        raise JobError(
            "the job has privacy.simulation_seed",
            why="noise that can be computed from a seed protects nobody; seeds are for simulations alone",
            fix="the coordinator must leave it out",
        )
    key = context.run_config.get(RUN_KEY)
    if not isinstance(key, str) or not RUN_KEY_PATTERN.match(key):
        raise JobError(
            f"the run has no '{RUN_KEY}'",
            why="the ledger books a run's releases under it, so that a resumed run is not charged twice",
            fix="the coordinator must send the 32 hex digits that `fedbridge-sim prepare` writes",
        )
    return key


def open_session(context: Context) -> Session:
    """A session for the node's site: `open_house`, then `admit`."""
    return admit(*open_house(context), context)

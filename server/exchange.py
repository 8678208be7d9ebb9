"""One question to many sites and their answers: sent, matched, checked, repeated where too few were good.

A bad, late or missing reply costs that site its turn, never the run. Answers are ordered by site name, so nothing that
follows depends on who answered first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from bridge.job import Job
from bridge.messages import ARRAYS, CONFIG, ReasonCode
from bridge.prototype import Arrays
from server.book import REFUSED, RunBook
from server.errors import ReplyError, RunError
from server.events import EventLog
from server.replies import (
    BAD_REPLY,
    NO_REPLY,
    OFFLINE,
    Answer,
    Expected,
    check_weight,
    content_bytes,
    error_code,
    read_reply,
)

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Question:
    """What is asked of every site in one exchange.

    `phase` is its name for people: `probe`, `round 3`. `check` may refuse, with `ReplyError`, an answer that fits the
    schema.
    """

    phase: str
    message: str
    expected: Expected
    config: Mapping[str, int | str] = field(default_factory=dict)
    arrays: Arrays | None = None
    check: Callable[[Answer], None] | None = None


@dataclass
class Answers:
    """Good answers by site, sorted by name; the others' codes; bytes of what was sent and of all that came."""

    good: dict[str, Answer] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


class Exchange:
    """Asks the sites of a roster (`name -> node id`) under the job's timeouts, retries and minimum."""

    def __init__(self, grid: Grid, job: Job, book: RunBook, log: EventLog) -> None:
        self.grid, self.job, self.book, self.log = grid, job, book, log
        self.roster: dict[str, int] = {}

    def ask(self, question: Question, at_least: int = 0, *, refusals_stand: bool = False) -> Answers:
        """Ask every site of the roster; repeat up to `sites.retries` times while fewer than `at_least` answered well.

        A repetition goes to the sites without a good answer alone: the others' answers stay, since a site answers the
        same question the same way. With `refusals_stand`, a site that said why it does not answer isn't asked again
        either. Raises nothing for sites that did not answer well.
        """
        answers = Answers()
        self._ask(question, sorted(self.roster), answers)
        for attempt in range(1, self.job.sites.retries + 1):
            missing = [site for site in sorted(self.roster) if site not in answers.good]
            if refusals_stand:
                missing = [site for site in missing if answers.lost[site] not in ReasonCode.__members__]
            if len(answers.good) >= at_least or not missing:
                break
            self.log.emit("retry", phase=question.phase, attempt=attempt, good=len(answers.good), sites=missing)
            self._wait_online(at_least)
            self._ask(question, missing, answers)
        answers.good = dict(sorted(answers.good.items()))
        return answers

    def ask_enough(self, question: Question) -> Answers:
        """Ask until at least `sites.minimum` sites answered well; else `RunError` names the missing and their codes."""
        minimum = self.job.sites.minimum
        answers = self.ask(question, minimum)
        if len(answers.good) >= minimum:
            return answers
        codes = ", ".join(f"{site} ({code})" for site, code in sorted(answers.lost.items()))
        raise RunError(
            f"{question.phase}: {len(answers.good)} good replies, {minimum} are needed; missing: {codes}",
            why=f"asked {self.job.sites.retries + 1} times; what each code means is in docs/reference/errors.md",
            fix="see to the missing sites, then resume the run, or lower sites.minimum in a new job",
        )

    def _ask(self, question: Question, sites: list[str], answers: Answers) -> None:
        online = set(self.grid.get_node_ids())
        for site in sites:
            if self.roster[site] not in online:
                self._lose(site, question.phase, OFFLINE, answers)
        asked = {self.roster[site]: site for site in sites if self.roster[site] in online}
        content = _content(question)
        requests = [
            Message(content, dst_node_id=node, message_type=question.message, group_id=question.phase) for node in asked
        ]
        answers.bytes_down += len(requests) * _array_bytes(content)
        replies = post(self.grid, requests, self.job.sites.timeout_seconds)
        for node, site in asked.items():
            self._take(site, question, replies.get(node, []), answers)

    def _take(self, site: str, question: Question, replies: list[Message], answers: Answers) -> None:
        answers.bytes_up += sum(content_bytes(reply) for reply in replies)
        try:
            reply = the_reply(replies)
            if reply is None or reply.has_error():
                self._lose(site, question.phase, NO_REPLY if reply is None else error_code(reply), answers)
                return
            answer = read_reply(reply, question.expected)
            if "weight" in answer.values:
                check_weight(answer, self.job.sites.weight(site))
            if question.check is not None:
                question.check(answer)
        except ReplyError as error:
            self.book.count(site, REFUSED, sum(content_bytes(reply) for reply in replies))
            self._lose(site, question.phase, BAD_REPLY, answers, str(error))
            return
        for item, size in answer.sizes.items():
            self.book.count(site, item, size)
        answers.lost.pop(site, None)
        answers.good[site] = answer

    def _lose(self, site: str, phase: str, code: str, answers: Answers, why: str = "") -> None:
        answers.lost[site] = code
        self.book.lost_turn(site, phase, code)
        self.log.emit("lost_turn", site=site, phase=phase, code=code, **({"why": why} if why else {}))

    def _wait_online(self, minimum: int) -> None:
        """Give sites that dropped out `sites.wait_seconds` to come back; whoever is there then is asked."""
        deadline = time.monotonic() + self.job.sites.wait_seconds
        nodes = set(self.roster.values())
        while len(nodes & set(self.grid.get_node_ids())) < min(minimum, len(nodes)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def post(grid: Grid, requests: list[Message], timeout: float) -> dict[int, list[Message]]:
    """Send requests (one a node) and match what comes, by node: a reply belongs to the request that it names.

    Error replies that Flower makes itself come from no site, so the request tells whose turn it was; a reply with
    content must come from the node that was asked. Others are left out. No `ttl` is set: Flower subtracts the two
    machines' clocks for it, and a site whose clock is wrong by an hour could not answer at all.
    """
    if not requests:
        return {}
    replies = list(grid.send_and_receive(requests, timeout=timeout))
    asked = {request.metadata.message_id: request.metadata.dst_node_id for request in requests}
    matched: dict[int, list[Message]] = {}
    for reply in replies:
        node = asked.get(reply.metadata.reply_to_message_id)
        if node is not None and (reply.has_error() or reply.metadata.src_node_id == node):
            matched.setdefault(node, []).append(reply)
    return matched


def the_reply(replies: list[Message]) -> Message | None:
    """The one reply of a site, None for silence; doubles are dropped. `ReplyError` where they differ: which is true?"""
    if not replies:
        return None
    if len(replies) > 1 and len({_fingerprint(reply) for reply in replies}) > 1:
        raise ReplyError("the site sent different replies to one message", why="only one can be right")
    return replies[0]


def _fingerprint(reply: Message) -> str:
    return f"error {reply.error.code}" if reply.has_error() else reply.content.object_id


def _content(question: Question) -> RecordDict:
    content = RecordDict()
    if question.arrays is not None:
        content[ARRAYS] = ArrayRecord({name: Array(array) for name, array in question.arrays.items()})
    content[CONFIG] = ConfigRecord(dict(question.config))
    return content


def _array_bytes(content: RecordDict) -> int:
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())

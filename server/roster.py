"""Who takes part: wait until the sites are online, ask each to describe itself, and keep those that may and can."""

from __future__ import annotations

import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from bridge.job import Job
from bridge.messages import CONFIG, DESCRIBE, ReasonCode
from server.book import REFUSED, RunBook
from server.errors import ReplyError, RunError
from server.events import EventLog
from server.exchange import POLL_SECONDS, post, the_reply
from server.replies import BAD_REPLY, NO_REPLY, Answer, Expected, content_bytes, error_code, read_reply

NOT_EXPECTED, SAME_NAME, OTHER_NAME = "NOT_EXPECTED", "SAME_NAME", "OTHER_NAME"
_SETTLE_SECONDS = 1.0
"""Sites register one by one: where the job does not say how many to expect, wait until none came for so long."""

_EXPECTED = Expected(required=("site", "can_take_part", "reason"))


class Describing:
    """Asks every node who it is, until enough sites answered or the job's retries are used up.

    A node is known by the agreed name that its site answers. In a deployment the grid knows the name under which each
    node was enrolled, too: then only nodes that the job expects are asked, and one that answers another name is
    refused. Elsewhere two nodes of one name are both refused: there is no telling which is the right one.
    """

    def __init__(self, grid: Grid, job: Job, book: RunBook, log: EventLog) -> None:
        self._grid, self._job, self._book, self._log = grid, job, book, log
        self._answers: dict[int, Answer] = {}
        self._failed: dict[int, str] = {}
        self._enrolled: dict[int, str] = {}

    def run(self) -> dict[str, int]:
        """Site name to node id of those that take part. Raises `RunError` where they are fewer than `sites.minimum`."""
        sites = self._job.sites
        self._wait()
        roster: dict[str, int] = {}
        for attempt in range(sites.retries + 1):
            nodes = self._awaited(sites.minimum - len(roster)) if attempt else self._unanswered()
            if attempt and not nodes:
                break
            self._log.emit("describe", state="started", sites=len(nodes), attempt=attempt)
            self._ask(nodes)
            roster = self._roster()
            if len(roster) >= sites.minimum and not self._failed:
                break
        self._record()
        self._log.emit("describe", state="done", sites=sorted(roster))
        if len(roster) < sites.minimum:
            raise RunError(
                f"describe: {len(roster)} sites can take part, {sites.minimum} are needed",
                why=self._reasons(roster),
                fix="see to the sites named, or lower sites.minimum",
            )
        return roster

    def _wait(self) -> None:
        """Until the expected number of sites is online, or enough and no more are coming, or the deadline."""
        sites = self._job.sites
        deadline = time.monotonic() + sites.wait_seconds
        wanted = len(sites.expected) or sites.minimum
        count, since = -1, time.monotonic()
        while time.monotonic() < deadline:
            now = len(self._candidates())
            if now != count:
                count, since = now, time.monotonic()
            settled = bool(sites.expected) or time.monotonic() - since >= _SETTLE_SECONDS
            if now >= wanted and settled:
                return
            time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
        if count < sites.minimum:
            raise RunError(
                f"{max(count, 0)} sites are online after {sites.wait_seconds:g} s, {sites.minimum} are needed",
                why="the others have not connected to the coordinator",
                fix="start the missing sites or raise sites.wait_seconds",
            )

    def _unanswered(self) -> list[int]:
        return [node for node in sorted(self._candidates()) if node not in self._answers]

    def _awaited(self, lacking: int) -> list[int]:
        """Whom to ask again. While that many are needed and may yet come, sites that dropped out get
        `sites.wait_seconds` to come back."""
        deadline = time.monotonic() + self._job.sites.wait_seconds
        while len(nodes := self._unanswered()) < lacking and time.monotonic() < deadline:
            if not self._failed and not set(self._job.sites.expected) - set(self._names()):
                break
            time.sleep(POLL_SECONDS)
        return nodes

    def _candidates(self) -> list[int]:
        """Nodes that are online and may be asked: those of unknown name, and those whose name the job expects."""
        online = {node.node_id: str(node.name) for node in self._grid.get_nodes()}
        self._enrolled |= online
        expected = self._job.sites.expected
        return [node for node, name in online.items() if not (name and expected and name not in expected)]

    def _ask(self, nodes: list[int]) -> None:
        content = RecordDict({CONFIG: ConfigRecord({})})
        requests = [Message(content, dst_node_id=node, message_type=DESCRIBE, group_id="describe") for node in nodes]
        replies = post(self._grid, requests, self._job.sites.timeout_seconds)
        self._failed = {node: code for node, code in self._failed.items() if node not in nodes}
        for node in nodes:
            try:
                reply = the_reply(replies.get(node, []))
                if reply is None or reply.has_error():
                    self._lose(node, NO_REPLY if reply is None else error_code(reply))
                else:
                    self._answers[node] = read_reply(reply, _EXPECTED)
            except ReplyError as error:
                self._book.count(self._called(node), REFUSED, sum(map(content_bytes, replies.get(node, []))))
                self._lose(node, BAD_REPLY, str(error))

    def _lose(self, node: int, code: str, why: str = "") -> None:
        self._failed[node] = code
        site = self._called(node)
        self._book.lost_turn(site, "describe", code)
        self._log.emit("lost_turn", site=site, phase="describe", code=code, **({"why": why} if why else {}))

    def _called(self, node: int) -> str:
        """What a node is called that has not said who it is, or says another name than it was enrolled under."""
        return self._enrolled.get(node) or f"node-{node}"

    def _strangers(self) -> list[int]:
        """Nodes that answered another name than the one under which they were enrolled."""
        return [
            node
            for node, answer in sorted(self._answers.items())
            if self._enrolled.get(node) and answer.values["site"] != self._enrolled[node]
        ]

    def _names(self) -> dict[str, list[int]]:
        names: dict[str, list[int]] = {}
        strangers = self._strangers()
        for node, answer in sorted(self._answers.items()):
            if node not in strangers:
                names.setdefault(answer.values["site"], []).append(node)
        return dict(sorted(names.items()))

    def _verdict(self, name: str, nodes: list[int]) -> tuple[bool, str]:
        """Whether the site of that name takes part, and the code of why not."""
        if len(nodes) > 1:
            return False, SAME_NAME
        if self._job.sites.expected and name not in self._job.sites.expected:
            return False, NOT_EXPECTED
        if self._job.sites.weights and name not in self._job.sites.weights:
            return False, NOT_EXPECTED
        values = self._answers[nodes[0]].values
        try:
            reason = ReasonCode(int(values["reason"])).name
        except ValueError:
            reason = "UNKNOWN_CODE"
        return bool(values["can_take_part"]), reason

    def _roster(self) -> dict[str, int]:
        return {name: nodes[0] for name, nodes in self._names().items() if self._verdict(name, nodes)[0]}

    def _record(self) -> None:
        for name in sorted(set(self._job.sites.expected) - set(self._names())):
            self._book.described(name, False, NO_REPLY)
        for name, nodes in self._names().items():
            can, reason = self._verdict(name, nodes)
            self._book.described(name, can, reason)
            self._count(name, nodes)
            if reason == SAME_NAME:
                self._log.emit("note", text=f"{len(nodes)} sites answer as '{name}': none of them takes part")
        for node, code in self._failed.items():
            self._book.described(self._called(node), False, code)
        for node in self._strangers():
            self._book.described(self._called(node), False, OTHER_NAME)
            self._count(self._called(node), [node])
            self._log.emit("note", text=f"the node enrolled as '{self._called(node)}' says that it is another site")
        not_asked = sorted({*self._enrolled.values()} - {"", *self._job.sites.expected})
        if self._job.sites.expected and not_asked:
            self._log.emit("note", text=f"not asked, since the job does not expect them: {', '.join(not_asked)}")

    def _count(self, site: str, nodes: list[int]) -> None:
        for node in nodes:
            for item, size in self._answers[node].sizes.items():
                self._book.count(site, item, size)

    def _reasons(self, roster: dict[str, int]) -> str:
        said = {name: self._verdict(name, nodes)[1] for name, nodes in self._names().items() if name not in roster}
        said |= {name: NO_REPLY for name in self._job.sites.expected if name not in self._names()}
        said |= {self._called(node): code for node, code in self._failed.items()}
        said |= {self._called(node): OTHER_NAME for node in self._strangers()}
        return "; ".join(f"{name}: {code}" for name, code in said.items()) or "no site answered"

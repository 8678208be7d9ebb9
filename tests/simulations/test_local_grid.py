"""The in-process grid against what Flower's runtime does, with trivial apps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from simulations.errors import EngineError
from simulations.local_grid import LocalGrid, run_local

Main = Callable[[Grid, Context], None]


def server(main: Main) -> ServerApp:
    app = ServerApp()
    app.main()(main)
    return app


def client(train: Callable[[Message, Context], Message]) -> ClientApp:
    app = ClientApp()
    app.train()(train)
    return app


def ask(grid: Grid, content: RecordDict, kind: str = "train", timeout: float | None = 30) -> list[Message]:
    messages = [Message(content, node, kind, group_id="1") for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages, timeout=timeout))


def numbers(values: list[float]) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord({"w": Array(np.array(values, np.float32))})})


def test_a_site_sees_its_partition_its_run_config_and_the_message() -> None:
    seen: list[tuple[object, ...]] = []

    def train(message: Message, context: Context) -> Message:
        seen.append((context.node_config["partition-id"], context.node_config["num-partitions"], context.run_config))
        assert message.metadata.message_id
        return Message(message.content, reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        replies = ask(grid, numbers([1, 2]))
        assert [reply.metadata.src_node_id for reply in replies] == list(grid.get_node_ids())
        assert context.run_config == {"a": 1}
        assert context.node_config == {}
        assert all(reply.metadata.reply_to_message_id and reply.metadata.message_id for reply in replies)
        assert all(reply.metadata.run_id == grid.run.run_id for reply in replies)

    run_local(server(main), client(train), {"a": 1}, sites=3)
    assert sorted(seen) == [(0, 3, {"a": 1}), (1, 3, {"a": 1}), (2, 3, {"a": 1})]


def test_editing_a_message_does_not_reach_the_neighbour_or_the_server() -> None:
    barrier = threading.Barrier(2, timeout=20)

    def train(message: Message, context: Context) -> Message:
        barrier.wait()  # both sites hold their copy now, so a shared one would be edited twice
        message.content["arrays"]["w"].data = b"gone"  # type: ignore[union-attr,call-overload,index]
        own = float(context.node_config["partition-id"])
        return Message(RecordDict({"m": MetricRecord({"own": own})}), reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        content = numbers([3, 4])
        assert [reply.content["m"]["own"] for reply in ask(grid, content)] == [0.0, 1.0]
        assert content.array_records["arrays"]["w"].numpy().tolist() == [3, 4]

    run_local(server(main), client(train), {}, sites=2, workers=2)


def test_replies_come_in_the_order_of_the_sites_not_of_arrival() -> None:
    finished: list[int] = []

    def train(message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        time.sleep(0.2 * (3 - site))
        finished.append(site)
        return Message(numbers([site]), reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        values = [float(r.content.array_records["arrays"]["w"].numpy()[0]) for r in ask(grid, numbers([0]))]
        assert values == [0, 1, 2, 3]

    run_local(server(main), client(train), {}, sites=4, workers=4)
    assert finished == [3, 2, 1, 0]


def test_a_raising_client_is_an_error_reply_of_code_2_and_the_run_goes_on() -> None:
    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1:
            raise ValueError("secret")
        return Message(message.content, reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        first, second = ask(grid, numbers([1]))
        assert first.has_content()
        assert second.error.code == 2
        assert second.error.reason == "<class 'ValueError'>:<'secret'>"
        unknown = ask(grid, numbers([1]), "query.nothing")
        assert [reply.error.code for reply in unknown] == [2, 2]

    run_local(server(main), client(train), {}, sites=2)


def test_a_reply_that_cannot_be_serialised_is_an_error() -> None:
    def train(message: Message, context: Context) -> Message:
        record = MetricRecord({"x": 1.0})
        record._data["x"] = object()  # type: ignore[assignment]
        return Message(RecordDict({"m": record}), reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        (reply,) = ask(grid, numbers([1]))
        assert reply.error.code == 2

    run_local(server(main), client(train), {}, sites=1)


def test_a_late_site_is_missing_and_its_reply_never_comes_later() -> None:
    release = threading.Event()

    def train(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 0 and message.content.config_records["c"]["turn"] == 1:
            release.wait(20)
        return Message(message.content, reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        def turn(number: int, timeout: float) -> list[Message]:
            return ask(grid, RecordDict({"c": ConfigRecord({"turn": number})}), timeout=timeout)

        _, second = grid.get_node_ids()
        assert [reply.metadata.src_node_id for reply in turn(1, 0.3)] == [second]
        release.set()
        assert [reply.content.config_records["c"]["turn"] for reply in turn(2, 20)] == [2, 2]

    run_local(server(main), client(train), {}, sites=2)


def test_two_workers_compute_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=20)

    def train(message: Message, context: Context) -> Message:
        meeting.wait()  # breaks unless both sites are inside at the same time
        return Message(message.content, reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        assert not any(reply.has_error() for reply in ask(grid, numbers([1])))

    run_local(server(main), client(train), {}, sites=2, workers=2)


def test_a_site_keeps_its_context_for_the_whole_run() -> None:
    def train(message: Message, context: Context) -> Message:
        turns = int(context.state.config_records["n"]["turns"]) if "n" in context.state else 0  # type: ignore[arg-type]
        context.state["n"] = ConfigRecord({"turns": turns + 1})
        return Message(RecordDict({"m": MetricRecord({"turns": turns})}), reply_to=message)

    def main(grid: Grid, context: Context) -> None:
        told = [[reply.content["m"]["turns"] for reply in ask(grid, numbers([1]))] for _ in range(3)]
        assert told == [[0, 0], [1, 1], [2, 2]]

    run_local(server(main), client(train), {}, sites=2)


def test_what_the_server_app_raises_comes_out() -> None:
    def main(grid: Grid, context: Context) -> None:
        raise KeyError("at the server")

    with pytest.raises(KeyError, match="at the server"):
        run_local(server(main), ClientApp(), {}, sites=1)


def test_flowers_own_strategy_averages_over_it() -> None:
    def train(message: Message, context: Context) -> Message:
        start = message.content.array_records["arrays"]["w"].numpy()
        mine = ArrayRecord({"w": Array(start + np.float32(int(context.node_config["partition-id"])))})
        return Message(RecordDict({"arrays": mine, "metrics": MetricRecord({"weight": 1.0})}), reply_to=message)

    results = []

    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, weighted_by_key="weight")
        result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(2, np.float32))}), num_rounds=5)
        results.append(result.arrays["w"].numpy())

    run_local(server(main), client(train), {}, sites=3)
    np.testing.assert_array_equal(results[0], [5.0, 5.0])  # each round adds (0 + 1 + 2) / 3


def test_wrap_puts_another_grid_around() -> None:
    grids: list[Grid] = []

    def main(grid: Grid, context: Context) -> None:
        assert grid is grids[0]

    run_local(server(main), ClientApp(), {}, sites=1, wrap=lambda grid: grids.append(grid) or grid)
    assert isinstance(grids[0], LocalGrid)


@pytest.mark.parametrize(("sites", "workers"), [(0, 1), (1, 0)])
def test_nothing_to_run_is_refused(sites: int, workers: int) -> None:
    with pytest.raises(EngineError, match="can't run"):
        LocalGrid(ClientApp(), {}, sites, workers)

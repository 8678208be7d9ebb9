"""The in-process engine against Flower's own simulation, and its overhead: `python -m benchmarks.engine`.

The same small app runs on both: FedAvg over a bridge of 20,000 parameters, with clients that only add to it. So what is
measured is the engine: messages, wire format, scheduling. Baseline: `flwr run` on Ray, as a first version would use for
every simulated run.
"""

from __future__ import annotations

import cProfile
import importlib.util
import logging
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

SITES, ROUNDS, GOAL = 4, 20, 400
LONG = 200

APP = '''
"""FedAvg over 20,000 parameters; a client adds its partition's number to each."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

SHAPES = {"A": (64, 8), "B": (8, 2180), "P": (32, 64)}
server = ServerApp()
client = ClientApp()


@client.train()
def train(message, context):
    step = np.float32(context.node_config["partition-id"])
    arrays = {name: Array(array.numpy() + step) for name, array in message.content["arrays"].items()}
    reply = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"weight": 1.0})})
    return Message(reply, reply_to=message)


@server.main()
def main(grid, context):
    import time

    sites = context.run_config["sites"]
    while len(list(grid.get_node_ids())) < sites:
        time.sleep(0.05)
    arrays = ArrayRecord({name: Array(np.zeros(shape, np.float32)) for name, shape in SHAPES.items()})
    strategy = FedAvg(fraction_evaluate=0.0, weighted_by_key="weight", min_train_nodes=sites, min_available_nodes=sites)
    started = time.perf_counter()
    for number in range(1, context.run_config["rounds"] + 1):
        out = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(number, list(grid.send_and_receive(out, timeout=600)))
    seconds = time.perf_counter() - started
    mean = float(arrays["A"].numpy()[0, 0])
    with open(context.run_config["out"], "w") as file:
        file.write(f"{seconds} {mean}")
'''

PYPROJECT = """[project]
name = "benchmark"
version = "0.1.0"
description = "FedAvg over 20,000 parameters"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedbridge"
[tool.flwr.app.components]
serverapp = "benchmark_app:server"
clientapp = "benchmark_app:client"
[tool.flwr.app.config]
sites = 4
rounds = 20
out = ""
"""


def main() -> None:
    import flwr.serverapp  # noqa: F401 - it sets its logger's level as it is imported

    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        app = _write_app(folder / "app")
        module = _imported(app)
        whole, inside = _timed(lambda out: _local(module, out, ROUNDS), folder / "local.txt")
        before = time.process_time()
        _, long_inside = _timed(lambda out: _local(module, out, LONG), folder / "long.txt")
        busy = time.process_time() - before
        whole_flower, inside_flower = _timed(lambda out: _flower(app, out, folder), folder / "flower.txt")
        shares = _where_time_goes(module, folder / "profile.txt")
    per_second = SITES * LONG / long_inside
    print(f"{SITES} sites x {ROUNDS} rounds, 20,000 parameters, FedAvg, trivial client")
    print(f"  in-process engine     {whole:8.2f} s, of which rounds {inside:6.2f} s")
    print(f"  flwr run (Ray)        {whole_flower:8.2f} s, of which rounds {inside_flower:6.2f} s")
    print(f"  ratio                 {whole_flower / whole:8.1f} x the whole, {inside_flower / inside:.1f} x the rounds")
    met = "met" if per_second >= GOAL else "MISSED"
    print(f"  overhead              {per_second:8.0f} site-rounds a second over {LONG} rounds (goal {GOAL}: {met})")
    print(
        f"                        {SITES * LONG / busy:8.0f} a second of processor time, whatever else the machine does"
    )
    print("where a site-round's time goes (profiled, in one thread):")
    for part, share in shares.items():
        print(f"  {share:6.1%}  {part}")


def _write_app(folder: Path) -> Path:
    folder.mkdir()
    (folder / "benchmark_app.py").write_text(APP)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder


def _imported(app: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_app", app / "benchmark_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _timed(run: Callable[[Path], None], out: Path) -> tuple[float, float]:
    """Seconds of the whole run, and of its rounds as the server measured them; checks the trained values."""
    started = time.perf_counter()
    run(out)
    whole = time.perf_counter() - started
    inside, value = map(float, out.read_text().split())
    rounds = LONG if out.stem == "long" else ROUNDS
    expected = rounds * (SITES - 1) / 2
    assert abs(value - expected) < 1e-3 * expected, f"{out.stem}: trained {value}, expected {expected}"
    return whole, inside


def _local(module: ModuleType, out: Path, rounds: int, workers: int = 2) -> None:
    from simulations.local_grid import run_local

    config = {"sites": SITES, "rounds": rounds, "out": str(out)}
    run_local(module.server, module.client, config, SITES, workers)


def _flower(app: Path, out: Path, folder: Path) -> None:
    from simulations.federation import federation_config
    from simulations.flower_engine import run_flower

    config = {"sites": SITES, "rounds": ROUNDS, "out": str(out)}
    run_flower(app, config, federation_config(SITES, 2), folder, ended=out.is_file)


class _Now:
    """A pool that works at once in the caller's thread, so that the profiler sees everything."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        from concurrent.futures import Future

        future: Future[Any] = Future()
        future.set_result(work(*arguments))
        return future

    def shutdown(self, **options: bool) -> None:
        """Nothing to end."""


def _where_time_goes(module: ModuleType, out: Path) -> dict[str, float]:
    from simulations import local_grid

    pool, profile = local_grid.ThreadPoolExecutor, cProfile.Profile()
    local_grid.ThreadPoolExecutor = lambda **options: _Now()  # type: ignore[assignment,misc]
    try:
        profile.runcall(_local, module, out, ROUNDS)
    finally:
        local_grid.ThreadPoolExecutor = pool  # type: ignore[misc]
    times = {
        (Path(file).name, name): figures[3]
        for (file, _, name), figures in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    }
    total = times["engine.py", "_local"]
    parts = {
        "wire format: deflating, with its sha256 of every object": times["local_grid.py", "_deflate_all"]
        + times["local_grid.py", "_deflate"],
        "wire format: inflating": times["local_grid.py", "_inflate"],
        "the client: reading arrays, adding, writing them": times["benchmark_app.py", "train"],
        "the strategy: averaging": times["fedavg.py", "aggregate_train"],
    }
    shares = {part: seconds / total for part, seconds in parts.items()}
    return shares | {"all else (messages, scheduling, the strategy's own bookkeeping)": 1 - sum(shares.values())}


if __name__ == "__main__":
    sys.exit(main())

"""The ServerApp that Flower loads. What it does is in `server.run`; heavy imports wait until it is called."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the job of the run config; raises what stopped it, so that Flower marks the run as failed."""
    from server.careful_grid import CarefulGrid
    from server.run import Request, run

    request = Request.of(dict(context.run_config))
    run(CarefulGrid(grid) if request.engine == "deployment" else grid, request, str(context.run_id))

"""A grid over any configuration keys: many runs, one row each, curves with intervals, and a page (docs/sweeps.md)."""

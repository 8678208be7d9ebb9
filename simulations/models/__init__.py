"""The models of a simulation: made from public patients, converted from published files, or ready in folders.

`simulations.models.make` has the entries: `make_old`, `make_new`, and `make_models` for both.
"""

"""Parity of the published encoders with their originals, from folders of numeric fixtures."""

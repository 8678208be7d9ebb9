"""Benchmarks: one command each, printing ratios against a naive variant that is written there, in the same run."""

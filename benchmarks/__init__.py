"""Benchmarks: figures as ratios within one run, against the floor of the same machine. See README.md."""

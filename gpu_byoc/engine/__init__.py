"""Core policies and a backend, made to run."""

"""The process in the container: HTTP in front, the engine behind."""

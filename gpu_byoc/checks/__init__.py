"""What a person or a container asks before and while it serves: is this machine fit, is the worker well."""

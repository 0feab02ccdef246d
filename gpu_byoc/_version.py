"""The one place that says the version; read by the build and by ``/app-version``."""

VERSION = "0.1.0"

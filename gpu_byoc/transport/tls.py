"""What TLS certificates are believed."""

from __future__ import annotations

import ssl

from gpu_byoc.errors import ConfigError


def tls(insecure: bool = False, ca_file: str = "") -> ssl.SSLContext | bool:
    """For aiohttp's ``ssl``: the system's authorities, and those in ``ca_file`` (PEM); an orchestrator that signs its
    own certificate is put in there with it. ``insecure`` believes any.

    Raises:
        ConfigError: the file cannot be read, or has no certificate in it.
    """
    if insecure or not ca_file:
        return not insecure
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(ca_file)
    except ssl.SSLError as error:  # an OSError, too
        raise ConfigError(f"--ca-file: {ca_file} has no certificate in PEM form") from error
    except OSError as error:
        raise ConfigError(f"--ca-file: cannot read {ca_file}: {error.strerror}") from error
    return context

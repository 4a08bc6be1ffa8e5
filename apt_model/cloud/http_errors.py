"""What goes wrong with HTTP, as our own errors."""

import http.client
import ssl

from apt_model.core.errors import CloudError, DeadlineError, RefusedError, WireError

_NAMES = "give the address that the certificate is for, or have one issued for this name"
_CERTIFICATES = {62: _NAMES, 64: _NAMES, 9: "see that this machine's clock is right", 10: "renew it, or set the clock"}
"""What to do, by OpenSSL's number: another host's name or address, not yet valid, expired."""


def too_late(name: str, timeout: float) -> DeadlineError:
    """For an endpoint's whole exchange."""
    return DeadlineError(f"{name}: no answer within {timeout:.3g} s")


def mapped(error: Exception, name: str, timeout: float) -> CloudError:
    """The error of an endpoint for one of the socket's, TLS's or HTTP's."""
    if isinstance(error, TimeoutError):
        return too_late(name, timeout)
    if isinstance(error, ssl.SSLCertVerificationError):
        return RefusedError(
            f"{name}: its certificate cannot be trusted: {error.verify_message}",
            remedy=_CERTIFICATES.get(
                error.verify_code,
                "see that the address is right; the certificate of a private authority goes into a file that "
                "SSL_CERT_FILE names",
            ),
        )
    if isinstance(error, http.client.HTTPException | ValueError):
        return WireError(f"{name}: what it answers is no HTTP: {type(error).__name__}")
    return CloudError(f"{name} cannot be reached: {words(error)}")


def words(error: Exception) -> str:
    """The error's kind and its own words, not too many."""
    return f"{type(error).__name__}: {error}"[:200]

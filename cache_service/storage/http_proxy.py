"""Which proxy the environment names for a server: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY.

Names in lower case count, too, and before those in capitals, as for curl and Python's own urllib.
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment
from urllib.request import proxy_bypass_environment as bypass  # type: ignore[attr-defined]  # no stub

from cache_service.errors import ConfigError


class Proxy(NamedTuple):
    """A proxy. `url` has no password; `user` is `name:password` or empty."""

    variable: str
    url: str
    user: str


def proxy_of(scheme: str, host: str, port: int) -> Proxy | None:
    """The proxy for requests to a server; None if they go to the server itself.

    This machine's own addresses are never asked through a proxy, which could not reach them.

    Raises:
        ConfigError: the variable does not hold the URL of an HTTP proxy.
    """
    named = getproxies_environment()
    kind = scheme if named.get(scheme) else "all"
    url = named.get(kind)
    if not url or _is_this_machine(host) or _is_excluded(host, port, named):
        return None
    variable = f"{kind.upper()}_PROXY"
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        name, number = parts.hostname, parts.port
        if not name or parts.scheme not in ("http", "https"):
            raise ValueError("scheme, host")
    except ValueError:
        # Without the value: it may hold a password.
        raise ConfigError(
            f"the variable {variable} does not hold the URL of an HTTP proxy.",
            hint=f"Write http://HOST:PORT, or name {host} in NO_PROXY.",
        ) from None
    address = f"[{name}]" if ":" in name else name
    number = number or (443 if parts.scheme == "https" else 80)
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
    return Proxy(variable, f"{parts.scheme}://{address}:{number}", user)


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_excluded(host: str, port: int, named: dict[str, str]) -> bool:
    """Whether NO_PROXY names a host: by name, as part of a domain, or by a network of addresses."""
    if bypass(f"{host}:{port}", named):
        return True
    networks = [part.strip() for part in named.get("no", "").split(",") if "/" in part]
    try:
        address = ipaddress.ip_address(host)
        return any(address in ipaddress.ip_network(each, strict=False) for each in networks)
    except ValueError:
        return False

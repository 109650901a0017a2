"""The commands `serve` and `token`: caches over HTTP, and access tokens for them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.options import Json, Settings, emit

TOKEN_BYTES = 32
"""256 bits cannot be guessed, so requests with wrong tokens need not be slowed down."""


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(serve)
    app.command()(token)


def serve(
    root: Annotated[
        str,
        typer.Argument(
            help="Folder, or s3://bucket/prefix, with the caches.",
            metavar="ROOT",
            show_default=False,
        ),
    ],
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 8000 by default, 0 chooses a free one.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Path below which a proxy serves this service, such as /kd."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="A YAML file with tokens, limits and builds.", metavar="FILE"),
    ] = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Serve the caches of a folder over HTTP until interrupted."""
    from cache_service.api.app import create_app
    from cache_service.api.http.settings import load_serve_config
    from cache_service.api.server import reachable, run, url_of

    given: dict[str, Any] = {"host": host, "port": port, "prefix": prefix}
    loaded = load_serve_config(root, config, settings or (), given)

    def announce(on_host: str, on_port: int) -> None:
        url = url_of(reachable(on_host), on_port) + loaded.prefix
        emit({"url": url, "root": root}, as_json=json, text=f"serving {root} at {url}")

    run(create_app(loaded), loaded, announce=announce)


def token(
    name: Annotated[str, typer.Option(help="Name of the token's owner.")] = "token",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What it allows: read (default), build; repeatable."),
    ] = None,
    add: Annotated[
        str | None,
        typer.Option(help="Serve file to add its SHA-256 to; made if absent.", metavar="FILE"),
    ] = None,
    json: Json = False,
) -> None:
    """Create an access token.

    The token is printed once and never stored. The serve file needs its SHA-256: `--add` writes it.
    """
    import secrets

    from cache_service.api.http.auth import token_sha256
    from cache_service.api.http.settings import TokenConfig, add_token
    from cache_service.config import validate_config

    secret = f"kdc_{secrets.token_urlsafe(TOKEN_BYTES)}"
    entry = {"name": name, "sha256": token_sha256(secret), "scopes": scope or ["read"]}
    token = validate_config(TokenConfig, entry, where="kd-cache token")
    line = f"{{name: {name}, sha256: {token.sha256}, scopes: [{', '.join(token.scopes)}]}}"
    if add is not None:
        add_token(add, token)
        stored = f"{add} has its SHA-256; a service that runs reads the file at its next start."
    else:
        stored = f"Add this line to the serve file, under `tokens:`\n  - {line}"
    text = f"token: {secret}\nSet KD_CACHE_TOKEN to it on the client. {stored}"
    document = {"token": secret, "config": token.model_dump(mode="json")}
    emit(document, as_json=json, text=text)

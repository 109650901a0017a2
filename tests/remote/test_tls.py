"""Over https: whose certificate an authority of ours signed is believed, anybody else is not."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl

import pytest
from support.forward_proxy import forwarding
from support.ordered import same
from support.proxy import Fault, proxied
from support.serving import READ_TOKEN, TOKENS, serving

from cache_service.errors import ConfigError, StorageError
from cache_service.remote.cache import open_remote
from cache_service.remote.source import open_source
from cache_service.storage.retries import NO_RETRIES

x509 = pytest.importorskip("cryptography.x509", reason="cryptography makes the certificates")
from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402

DAY = dt.timedelta(days=1)


def named(name):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def certificate(name, key, issuer, issuer_key, *, authority=False, address=None):
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if address:
        own = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        made = made.add_extension(own, critical=False)
    return made.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def authority():
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def behind_tls(root, authority, tmp_path_factory):
    """URL of a cache by the address of its host: certificates for it and for another one."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    root_pem = certificate("ca", authority, "ca", authority, authority=True)
    (folder / "ca.pem").write_bytes(root_pem)

    def context(address):
        file = folder / f"{address}.pem"
        file.write_bytes(secret + certificate("server", key, "ca", authority, address=address))
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(file)
        return made

    with (
        serving(root, tokens=TOKENS) as server,
        proxied(int(server.url.rpartition(":")[2]), [Fault()], context("127.0.0.1")) as right,
        proxied(int(server.url.rpartition(":")[2]), [Fault()], context("192.0.2.1")) as wrong,
    ):
        urls = [f"https://127.0.0.1:{each.port}/v1/caches/c" for each in (right, wrong)]
        yield folder / "ca.pem", *urls


def test_a_cache_is_read_over_tls_with_an_authority_of_our_own(behind_tls, local, monkeypatch):
    file, url, _ = behind_tls
    monkeypatch.setenv("KD_CACHE_TOKEN", READ_TOKEN)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    cache = open_source(url, fingerprint=local.fingerprint)
    assert same(cache.read(1, 0, 300), local.read(1, 0, 300))


def test_an_authority_that_nobody_named_is_not_trusted(behind_tls, monkeypatch):
    _, url, _ = behind_tls
    monkeypatch.setenv("KD_CACHE_TOKEN", READ_TOKEN)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(ConfigError, match="certificate that is not trusted") as refused:
        open_source(url)
    assert "SSL_CERT_FILE" in refused.value.hint
    assert READ_TOKEN not in str(refused.value)


def test_a_certificate_of_another_host_is_not_trusted(behind_tls, monkeypatch):
    file, _, url = behind_tls
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(ConfigError, match="certificate that is not trusted"):
        open_source(url)


def test_a_cache_is_read_over_tls_through_a_tunnel_of_the_proxy(behind_tls, local, monkeypatch):
    file, _, other = behind_tls
    monkeypatch.setenv("KD_CACHE_TOKEN", READ_TOKEN)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with forwarding(int(other.split(":")[2].partition("/")[0]), user="u:p") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("://", "://u:p@"))
        cache = open_source("https://192.0.2.1/v1/caches/c", fingerprint=local.fingerprint)
        assert same(cache.read(1, 0, 300), local.read(1, 0, 300))
        assert set(proxy.asked) == {"CONNECT 192.0.2.1:443"}
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        with pytest.raises(StorageError, match="407") as refusal:
            open_remote("https://192.0.2.1/v1/caches/c", retries=NO_RETRIES)
        assert "of HTTPS_PROXY" in refusal.value.message
        assert READ_TOKEN not in str(refusal.value)

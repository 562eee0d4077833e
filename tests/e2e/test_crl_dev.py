"""The lists of an `idb dev`: where its certificates say that they are, OpenSSL finds them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import httpx
import pytest
from cryptography import x509

from identity_broker.dev.state import FILE_NAME
from support.broker import run_dev
from support.lists import list_url, parsed, serials


@pytest.mark.slow
def test_a_certificate_s_list_is_where_it_says_across_restarts(tmp_path: Path) -> None:
    directory = tmp_path / "dev"
    with run_dev(directory, "--ca", "local") as broker:
        made = broker.idb(
            *("entry", "create", "--id", "mine", "--spiffe-id", "/mine"),
            *("--selector", f"unix:uid:{os.getuid()}", "--wait"),
        )
        assert made.code == 0, made.err
        files = tmp_path / "svid"
        fetched = broker.idb("svid", "fetch", "--write", str(files))
        assert fetched.code == 0, fetched.err
        leaf = x509.load_pem_x509_certificate((files / "svid.pem").read_bytes())
        url = list_url(leaf)
        http = json.loads((directory / FILE_NAME).read_text())["broker"]["http_address"]
        assert url.startswith(f"http://{http}/crl/")
        [empty] = parsed([httpx.get(url).content])
        assert serials(empty) == []
        serial = f"{leaf.serial_number:040x}"
        revoked = broker.idb("revoke", "--serial", serial, "--yes")
        assert revoked.code == 0, revoked.err
        [crl] = parsed([httpx.get(url).content])
        assert serials(crl) == [serial]
    with run_dev(directory, "--ca", "local"):
        until = time.monotonic() + 10
        while True:
            [again] = parsed([httpx.get(url).content])
            if serials(again) == [serial]:
                break
            assert time.monotonic() < until
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        newer = again.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        assert newer > number

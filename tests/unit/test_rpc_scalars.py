"""Texts, ids and page tokens as they arrive."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from identity_api.broker.v1 import credential_pb2, entry_pb2, node_pb2, types_pb2
from identity_broker.errors import MalformedRequest, PageTokenInvalid
from identity_broker.server.rpc.convert import credentials, entries, nodes, scalars

LIST = "/identity_api.broker.v1.Entry/List"
UNPRINTABLE = st.text(min_size=1, max_size=20).filter(lambda text: not text.isprintable())


@given(UNPRINTABLE)
def test_unprintable_text_is_refused_and_its_field_named(text: str) -> None:
    with pytest.raises(MalformedRequest, match=r"^id "):
        scalars.from_id(text, "id")
    with pytest.raises(MalformedRequest, match=r"^owner "):
        entries.from_entry_filter(entry_pb2.ListEntriesRequest(owner=text))
    with pytest.raises(MalformedRequest, match=r"^hint "):
        entries.from_entry_filter(entry_pb2.ListEntriesRequest(hint=text))
    with pytest.raises(MalformedRequest, match=r"^attestor "):
        nodes.from_node_filter(node_pb2.ListNodesRequest(attestor=text))
    with pytest.raises(MalformedRequest, match=r"^entry_id "):
        credentials.from_credential_filter(credential_pb2.ListCredentialsRequest(entry_id=text))


def test_an_id_is_required_and_bounded() -> None:
    assert scalars.from_id("a" * 256, "id")
    for text in ("", "a" * 257, "\x00", "a\nb"):
        with pytest.raises(MalformedRequest):
            scalars.from_id(text, "id")


def test_a_page_token_is_good_for_its_method_and_filter_alone() -> None:
    request = entry_pb2.ListEntriesRequest(
        owner="payments",
        page_size=5,
        selectors=[
            types_pb2.Selector(type="unix", value="uid:1"),
            types_pb2.Selector(type="unix", value="gid:1"),
        ],
    )
    scope = scalars.page_scope(LIST, request)
    token = scalars.to_page_token("key", scope)
    assert scalars.from_page_token(token, scope) == "key"
    again = entry_pb2.ListEntriesRequest(
        owner="payments",
        page_size=7,
        page_token=token,
        selectors=list(reversed(request.selectors)),
    )
    assert scalars.page_scope(LIST, again) == scope
    for other in (
        scalars.page_scope("/identity_api.broker.v1.Node/List", request),
        scalars.page_scope(LIST, entry_pb2.ListEntriesRequest(hint="payments")),
        scalars.page_scope(LIST, entry_pb2.ListEntriesRequest()),
    ):
        assert other != scope
        with pytest.raises(PageTokenInvalid):
            scalars.from_page_token(token, other)


@pytest.mark.parametrize("key", ["\x00", "a\nb", "", "a" * 4096])
def test_a_forged_page_token_is_refused(key: str) -> None:
    token = base64.urlsafe_b64encode(f"2:scope:{key}".encode()).decode()
    with pytest.raises(PageTokenInvalid):
        scalars.from_page_token(token, "scope")

"""The one door from the event loop to the blocking CA library; `door` says how it opens."""

from __future__ import annotations

from identity_broker.signing.door import Authorities, Signing
from identity_broker.signing.errors import translate

__all__ = ["Authorities", "Signing", "translate"]

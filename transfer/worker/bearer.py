"""A worker's bearer token, as it is compared with what requests bring."""

from __future__ import annotations

import hmac


class Bearer:
    """The one value that an Authorization header may have; without a token whoever reaches the port may call."""

    def __init__(self, token: str) -> None:
        self.needed = bool(token)
        self._expected = b"Bearer " + token.encode()

    def allows(self, given: list[bytes]) -> bool:
        """Whether a request with these Authorization headers may call; compared in constant time."""
        return not self.needed or (len(given) == 1 and hmac.compare_digest(given[0], self._expected))

"""Between the API's messages and the broker's values; the only place that does either.

- `to_*` makes messages, `fill_*` fills one in place, `from_*` parses; parsing raises
  `RequestError`s that name the field.
- Nothing here touches the network, the store or a key.
"""

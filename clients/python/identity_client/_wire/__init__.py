"""The broker's messages, turned into the SDK's values and errors; nothing else reads them."""

"""How machines prove what they are."""

"""Chat over an index: conversations as text, passages as concepts."""

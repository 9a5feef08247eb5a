"""Other ways to compress passages, trained here: one reader, one set of data, equal minutes of one CPU thread."""

"""Kinds of files: how each becomes the texts of documents. Every library loads with the first file that needs it."""

"""Ingestion by many workers: the corpus in parts, each part encoded apart, all of them committed in one step."""

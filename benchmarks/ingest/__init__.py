"""How fast is ingestion, does it stay linear, and what does an edit cost?"""

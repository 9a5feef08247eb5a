"""Documents that many people change at once."""

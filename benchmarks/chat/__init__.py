"""What a chat costs from turn to turn."""

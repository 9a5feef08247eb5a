"""How many concepts a text gets: by a fixed rate, by its information, by a learned loss, within a budget; or none."""

"""The command line: `main` holds the everyday commands, each other file a group of them."""

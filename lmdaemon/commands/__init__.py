"""The command line: `cli` reads it and runs one command; the other modules have the commands and what they share."""

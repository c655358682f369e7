"""Settings that are read, and not told of in the documents and the shipped file until what they set is there."""

UNTOLD = {
    "sessions": {"daemon_grace"},
}

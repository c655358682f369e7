"""What lmdaemon costs, each figure beside its floor and its peers of the same run. See docs/performance.md."""

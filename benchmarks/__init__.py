"""What lmdaemon costs. Each figure is compared with a floor and with peers, all measured in the same run. See
docs/performance.md.
"""

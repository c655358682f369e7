"""Stores sessions and deliveries: the contract that the rest of the daemon uses, the rules, and the engines."""

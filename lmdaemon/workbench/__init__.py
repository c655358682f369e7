"""The integrator's workbench: tries an operator's endpoint, and plays an operator or a provider.

The daemon imports it only when the first test notice or check is asked for.
"""

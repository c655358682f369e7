"""The integrator's workbench: tries an operator's endpoint, and plays either side. The daemon never imports it."""

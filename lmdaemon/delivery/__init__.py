"""From a stored end to the operator's URL and the plug-ins."""

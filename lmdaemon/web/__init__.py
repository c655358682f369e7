"""The two listeners: the operators' endpoints, and the private API."""

"""The session table and the deliveries: what doers may know of them, the rules, and the engines."""

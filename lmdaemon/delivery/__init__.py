"""Delivers the stored ends of sessions to operators' URLs and to plug-ins."""

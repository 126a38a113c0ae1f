"""Gives tests what they need to exercise qhub and its plugins: servers, fixtures and conformance checks."""

"""Fixtures of the tests in a browser."""

from browser import browser, open_page, phone, small

__all__ = ["browser", "open_page", "phone", "small"]

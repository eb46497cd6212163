"""Serving: routing, HTTP middleware and engine plugins (nothing here yet; see CHANGELOG)."""

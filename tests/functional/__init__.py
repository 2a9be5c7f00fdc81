"""Guests, on every engine."""

"""Tests without root, KVM or network."""

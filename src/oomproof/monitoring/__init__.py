"""Staying alive: what is used is watched, leaks are told early, and a failure leaves a summary."""

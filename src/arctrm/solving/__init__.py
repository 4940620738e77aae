"""Solving: candidates, vote, scoring, submission, adaptation."""

"""Answering: questions, proposals, ranking, budget, adaptation, planning, scores."""

"""Evaluation of trained parameters: playing games, scores and videos."""

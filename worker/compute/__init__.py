"""Verbs: what is done to a guest. Each reads the real state first and converges; none knows Celery or Redis."""

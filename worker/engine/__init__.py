"""Durable execution on Redis: Celery carries messages, the journal decides what runs."""

"""The Celery tasks that operations are made of: each a few lines that hand a request to a verb."""

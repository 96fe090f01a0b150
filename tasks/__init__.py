"""What the fleet can do: one module per operation. Importing this package makes them known to Celery."""

from tasks import destroy, doctor, hosts, migrate, power, resize, snapshot, spawn

__all__ = ["destroy", "doctor", "hosts", "migrate", "power", "resize", "snapshot", "spawn"]

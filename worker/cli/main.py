"""The command's tree."""

from __future__ import annotations

import typer

from worker.cli import doctor, inventory, migrate, operations, power, resize, services, snapshots, spawn

EPILOG = (
    "Exit codes: 0 succeeded, 1 the operation failed, 2 bad usage or input, 3 cancelled, 4 broker or host unreachable."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run virtual-machine operations on a fleet of KVM hosts.",
    epilog=EPILOG,
)
app.command()(spawn.spawn)
app.command()(spawn.destroy)
app.add_typer(power.app, name="power")
app.add_typer(snapshots.app, name="snapshot")
app.command("snapshots")(snapshots.snapshots)
app.command()(resize.resize)
app.command()(migrate.migrate)
app.add_typer(migrate.app, name="migration")
app.command("operations")(operations.operations)
app.command("operation")(operations.operation)
app.command("watch")(operations.watch)
app.command("cancel")(operations.cancel)
app.command("instances")(inventory.instances)
app.add_typer(inventory.hosts_app, name="hosts")
app.add_typer(services.workers, name="worker")
app.command("doctor")(doctor.doctor)
app.command("flower")(services.flower)

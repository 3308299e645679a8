"""The verbs that show runs: `report` and `dashboard`."""

from __future__ import annotations

import click

from ekiden.cli.common import CONTEXT


@click.command(context_settings=CONTEXT)
@click.argument("run")
@click.option("--output", help="File of the page.  [default: RUN/report.html]")
@click.option("--picture/--no-picture", default=True, show_default=True, help="Write loss.png beside it.")
def report(run: str, output: str | None, picture: bool) -> None:
    """Write one page that shows RUN: curves, sessions, events, samples, checkpoints, settings. It needs no network.

    Training keeps RUN/report.html by itself; this writes it anew, from the history alone.

    Example: ekiden report run --output run.html
    """
    from ekiden.report import write_report

    for path in write_report(run, output, picture):
        click.echo(path)


@click.command(context_settings=CONTEXT)
@click.argument("runs", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="Port; 0: any free one."
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where the playground generates: cpu, cuda, cuda:N."
)
def dashboard(runs: tuple[str, ...], host: str, port: int, device: str) -> None:
    """Show RUNS live in a browser, compared, with a playground that generates from any of their checkpoints.

    RUNS are run directories, or folders of them. Ctrl-C ends it; nothing in a run is changed.

    Example: ekiden dashboard run-a run-b
    """
    from ekiden.report.dashboard import serve

    serve(list(runs), host, port, device)

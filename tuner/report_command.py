# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune report`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from jaxwin.tuner import database_commands
from jaxwin.tuner import report as pages
from jaxwin.tuner.database import default_path


@click.command("report", cls=database_commands.Command)
@click.argument(
    "output", type=click.Path(path_type=Path, dir_okay=False), default=Path("jaxwin-report.html")
)
@click.option("--all", "everything", is_flag=True, help="Of other machines and old kernels, too.")
@click.option("--no-peaks", is_flag=True, help="Do not measure this machine for the roofline.")
@database_commands.database_option
@click.option("--json", "as_json", is_flag=True, help="Print the numbers instead, as JSON.")
def command(
    output: Path, everything: bool, no_peaks: bool, database: Path | None, as_json: bool
) -> None:
    """Write what was measured as one HTML page, to OUTPUT.

    The page needs nothing else: no network, no scripts. It has the time of each convolution before
    and after, a roofline, how the searches went, which register tiles and parameters matter, the
    winners and the failures.

    \b
    Example:
      jaxwin-tune report
      jaxwin-tune report /tmp/site.html --database site.db --all
    """
    if database is not None and not database.exists():
        raise database_commands.Failure(f"{database}: does not exist")
    path = database or default_path()
    content = pages.gather(path, everything=everything, peaks=not no_peaks)
    if as_json:
        click.echo(json.dumps(content.to_json()))
        return
    try:
        output.write_text(pages.page(content), encoding="utf-8")
    except OSError as error:
        raise click.ClickException(f"{output}: {error.strerror}") from error
    click.echo(f"{output}: {len(content.subjects)} convolutions, {content.measured} measurements")

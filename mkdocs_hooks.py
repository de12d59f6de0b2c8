"""Fills the page of the command line with the `--help` of every command when the site is built."""

from __future__ import annotations

from typing import Any

import click

from quantc.cli.commands import main

PLACE = "<!-- help of every command -->"
WIDTH = 100


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with the help texts where it asks for them."""
    return markdown.replace(PLACE, "\n".join(_help(name, command) for name, command in main.commands.items()))


def _help(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"quantc {name}", max_content_width=WIDTH, terminal_width=WIDTH)
    return f"## quantc {name}\n\n```text\n{command.get_help(context)}\n```\n"

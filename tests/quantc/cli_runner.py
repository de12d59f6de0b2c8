"""What the tests of the command line share."""

from click.testing import CliRunner, Result

from quantc.cli import main
from quantc.report import LinearReport, Report
from quantc.spec import QuantSpec


def run(*arguments: str, columns: int | None = None) -> Result:
    """Run the command line in this process, with no terminal and, unless told, no COLUMNS."""
    environment = {"COLUMNS": None if columns is None else str(columns)}
    return CliRunner().invoke(main, list(arguments), prog_name="quantc", env=environment)


def make_report(output: str = "tiny-w4") -> Report:
    spec = QuantSpec(4, 128)
    linears = [
        LinearReport(f"model.layers.{block}.mlp.up_proj", spec, (256, 128), 0, 4.156, 0.01 * block, "gptq", 99)
        for block in range(1, 8)
    ]
    stack = LinearReport("model.layers.8.experts", spec, (64, 128), 4, 4.2, float("nan"), "gptq+rtn", 9, 3, 2)
    return Report(
        model="tiny",
        output=output,
        linears=[*linears, stack],
        kept={"model.layers.1.router": "a router decides, it does not multiply", "lm_head": "tied"},
        notes=["group size 64: 128 does not divide 192"],
        weights_bytes=2_500_000,
        source_bytes=10_000_000,
        calibration="builtin, 64 x 512 tokens",
        cpu_seconds=120.0,
        wall_seconds=65.0,
        peak_rss_bytes=1_400_000_000,
    )

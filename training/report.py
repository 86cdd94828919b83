"""Write one HTML page about one or several training runs, with curves, samples, quality and settings.

For users who follow a run or compare runs.

    python training/report.py runs/mine runs/other --output report.html

The page is a single file. It also shows unfinished runs. Quality appears after
`training/evaluate.py --output_dir runs/mine` has measured it.
"""

import cm_diffusers.engine.help_pages  # noqa: F401  (first: answers --help before slow imports)


# isort: split
from pathlib import Path

from cm_diffusers.engine.commands import parser_of
from cm_diffusers.engine.pictures.report import write_report
from cm_diffusers.engine.places import make_folder
from cm_diffusers.engine.processes import ends_with_a_line


def main(argv: list[str] | None = None) -> None:
    """Run the script with the command line `argv`, by default that of this process."""
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="Folders of the runs to show.")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="File of the page. Default: report.html."
    )
    args = parser.parse_args(argv)
    with ends_with_a_line("--output", "give the same command again"):
        if args.output.is_dir():
            raise ValueError(
                f"output {str(args.output)!r} is a folder. Give the name of the page, such as report.html."
            )
        make_folder(args.output.parent, "output")
        runs = write_report(args.runs, args.output)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"Saved {args.output}.")


if __name__ == "__main__":
    main()

"""Tables, pictures, the page, the README's part."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import page, plots, readme, tables
from benchmarks import report as reports
from benchmarks.machine import Probe, machine, noise
from benchmarks.metrics import written
from benchmarks.registry import GROUPS, Plot
from benchmarks.schema import load
from benchmarks.verdict import verdict
from gpu_byoc.errors import ConfigError
from tests.support.reports import jobs, report, row

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "hr", "img", "path", "use", "rect", "circle", "line"}


class Page(HTMLParser):
    """Refuses tags that are not closed in order; collects text and everything that could be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data", "poster")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def everything() -> dict[str, Any]:
    """Every group of the registry, with a row of each kind."""
    return report(**{group.name: jobs() for group in GROUPS}, made_up=[row("<b>a & b</b>", p50_us=1.0)])


@pytest.mark.parametrize("pictures", [None, {"jobs": ['<svg role="img"><text>1</text></svg>']}])
def test_the_page_holds_every_row_and_fetches_nothing(pictures: dict[str, list[str]] | None) -> None:
    told = everything()
    told["groups"]["jobs"]["rows"].append({"name": "worker, torch", "failed": "7 bytes differ"})
    text = page.html(told, pictures)
    found = Page(text)
    whole = " ".join(found.text)
    for group in told["groups"].values():
        assert group["title"] in whole
        assert group["question"] in whole
        for each in group["rows"]:
            assert each["name"] in whole
            assert each.get("skipped", "") in whole
            assert each.get("failed", "") in whole
    assert found.fetched == [f"#{name}" for name in told["groups"]]  # places in the page itself
    assert all(f'id="{name}"' in text for name in told["groups"])
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert "matplotlib is not installed" in whole or pictures is not None
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_what_is_unstable_is_said_in_words() -> None:
    (table,) = tables.figures_of(jobs())
    assert table.weak == [False, False, True]
    assert table.cells[2][-1] == "41% unstable"
    assert table.cells[0][-1] == "4%"


def test_words_that_the_name_says_have_no_column_and_other_words_have() -> None:
    rows = [
        row("worker, 1", target="worker", bound="decode", codec="h264", p50_us=1.0),
        row("chain, 1", target="chain", bound="loop", codec="h264"),
    ]
    (table,) = tables.figures_of(rows)
    assert table.heads == ["", "bound", "p50 µs", "spread"]
    assert table.numbers == [False, False, True, True]
    assert table.cells[1] == ["chain, 1", "loop", "", "4%"]


def test_rows_of_another_kind_stand_in_a_table_of_their_own() -> None:
    paced = [row(f"{count}", streams=count, p50_ms=1.0, missed=0, passed="yes") for count in (1, 2)]
    first, second = tables.figures_of([paced[0], row("how many", answer="2 streams", streams_that_fit=2), paced[1]])
    assert [line[0] for line in first.cells] == ["1", "2"]
    assert second.heads == ["", "answer", "streams that fit", "spread"]


def test_counts_that_the_name_says_and_what_only_the_file_has_have_no_column() -> None:
    rows = [row(f"worker, {n} connections", connections=n, jobs=720, refused=0, p50_us=200.0) for n in (4, 16)]
    (table,) = tables.figures_of(rows)
    assert table.heads == ["", "p50 µs", "spread"]
    rows[1]["refused"] = 3
    (table,) = tables.figures_of(rows)
    assert table.heads == ["", "refused", "p50 µs", "spread"]


def test_many_microseconds_are_milliseconds_unless_few_would_be_lost() -> None:
    def heads(*values: float) -> list[str]:
        (table,) = tables.figures_of([row(str(value), p50_us=value) for value in values])
        return table.heads

    assert heads(100.0, 20_000.0) == ["", "p50 ms", "spread"]
    assert heads(7.0, 20_000.0) == ["", "p50 µs", "spread"]
    assert heads(100.0, 9_000.0) == ["", "p50 µs", "spread"]
    (table,) = tables.figures_of([row("a", p50_us=20_000.0, handed_over_late_p99_us=20_000.0)])
    assert table.heads == ["", "p50 ms", "spread"]


def test_long_words_are_a_line_below_their_row() -> None:
    binding = "encode: 1.9 of 2 cores were busy, and it took 54%"
    told = report(
        capacity=[row("704x384, how many", streams_that_fit=7, binding=binding), row("b", streams_that_fit=1)]
    )
    (table,) = tables.figures_of(told["groups"]["capacity"]["rows"])
    assert table.heads == ["", "streams that fit", "spread"]
    assert table.notes == [[("binding", binding)], []]
    line = f"704x384, how many: binding: {binding}"
    assert f"\n\n* {line}\n" in tables.markdown(told, {})
    assert binding in page.html(told, None)
    console = Console(width=100)
    with console.capture() as shown:
        reports.show(console, told)
    assert f"  {line}\n" in shown.get()


def test_cost_has_a_table_of_its_own() -> None:
    told = report(jobs=[row("a", p50_us=1.0, rss_mb=60.0, cpu_seconds_per_million_frames=1234.5), row("b", p50_us=1.0)])
    assert all("RSS MB" not in table.heads for table in tables.figures_of(told["groups"]["jobs"]["rows"]))
    costs = tables.cost_of(told)
    assert costs.heads == ["", "CPU s / million frames", "RSS MB"]
    assert costs.cells == [["Jobs: a", "1,234", "60.0"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.00123, "0.00123"),
        (0.5, "0.50"),
        (12.345, "12.3"),
        (1234.5, "1,234"),
        (7, "7"),
        (12000, "12,000"),
        (True, "yes"),
        (None, ""),
        ("a", "a"),
    ],
)
def test_cells(value: Any, text: str) -> None:
    assert written(value) == text


def test_doubts_come_first() -> None:
    told = report(jobs=[*jobs(), {"name": "worker, torch", "failed": "7 bytes differ"}])
    told["size"] = "quick"
    told["noise"]["too_noisy"] = ["something else kept 1.5 cores busy"]
    noisy, quick, weak, failed = tables.doubts(told)
    assert "too noisy to decide anything: something else kept 1.5 cores busy" in noisy
    assert "quick run" in quick
    assert "1 of 3 rows" in weak
    assert "Jobs: worker, torch" in failed
    assert tables.doubts(report(jobs=[row("a", p50_us=1.0)])) == []


def test_markdown_has_every_row() -> None:
    text = tables.markdown(everything(), {"jobs": ["x-jobs-rate.png"]})
    assert all(f"## {group.name.capitalize()}" in text for group in GROUPS)
    assert text.count("| worker, 4 connections |") == len(GROUPS)
    (missing,) = (line for line in text.splitlines() if line.startswith("* cupy is not installed"))
    assert missing.count(": worker, cupy") == len(GROUPS)
    assert "![jobs](x-jobs-rate.png)" in text


def test_the_terminal_shows_what_was_skipped_and_unstable() -> None:
    console = Console(record=True, width=200, quiet=True)
    console.quiet = False
    with console.capture() as shown:
        reports.show(console, everything())
    assert "not run: cupy is not installed: pip install cupy-cuda12x\n  Copies: worker, cupy\n" in shown.get()
    assert re.search(r"41% *\n *unstable", shown.get())


def test_in_a_narrow_terminal_words_are_broken_and_figures_are_not() -> None:
    keys = ("frames_per_second", "gb_per_s", "p50_us", "p99_us", "device_us", "host_us", "copy_us", "of_ceiling")
    figures = {key: 9.0 if key == "gb_per_s" else 654_321.0 for key in keys} | {"copy_us": 3.0, "host_us": 3.0}
    told = report(kernels=[row(f"numpy, green_tint, 1920x1080, {n} frames", batch=n, **figures) for n in (1, 64)])
    console = Console(width=100)
    with console.capture() as shown:
        reports.show(console, told)
    lines = shown.get().splitlines()
    table = lines[: next(n for n, line in enumerate(lines) if line.startswith("Intel"))]
    assert max(map(len, table)) <= 100
    assert "…" not in shown.get()
    assert shown.get().count("654,321") == 2 * 2
    assert len(re.findall(r"\b654\b(?!,)", shown.get())) == 2 * 3
    assert table[-3].strip() == "frames"


# --- the verdict


def engine(size: str, batch: int, rate: float, backend: str = "numpy", **more: Any) -> dict[str, Any]:
    name = f"{backend}, {size}, {batch}"
    return row(name, what="engine", backend=backend, size=size, batch=batch, frames_per_second=rate, **more)


def answers(told: dict[str, Any]) -> dict[str, str]:
    return {each.question: each.answer for each in verdict(told)}


def test_the_verdict_says_which_backend_and_the_smallest_batch_that_is_enough() -> None:
    rows = [
        *(engine("640x480", batch, rate) for batch, rate in ((1, 900.0), (8, 1000.0), (64, 1010.0))),
        *(engine("1920x1080", batch, rate) for batch, rate in ((1, 100.0), (8, 101.0), (64, 90.0))),
        *(engine("1920x1080", batch, rate, "cupy") for batch, rate in ((1, 50.0), (8, 300.0), (64, 500.0))),
        engine("1920x1080", 99, 9999.0, "torch", unstable=True),
    ]
    found = answers(report(engine=rows))
    assert found["Which backend?"] == "cupy"
    assert found["Which batch?"] == "64 at 1920x1080"
    only = answers(report(engine=[each for each in rows if each["backend"] == "numpy"]))
    assert only["Which batch?"] == "8 at 640x480, 1 at 1920x1080"


def test_the_verdict_says_where_a_cpu_is_as_fast() -> None:
    wins = [
        row("x", backend="torch", batch=1, from_size="always", from_size_on_device="always"),
        row("y", backend="cupy", batch=1, from_size="never", from_size_on_device="1920x1080"),
        row("z", backend="cupy", batch=8, from_size="640x480", from_size_on_device="always"),
    ]
    told = report(engine=[*wins, engine("640x480", 8, 99.0, "cupy"), engine("640x480", 8, 9.0)])
    told["machine"]["gpus"] = [{"name": "H100", "driver": "580", "memory_mib": 80_000}]
    (found,) = (each for each in verdict(told) if each.question == "When not to use a GPU?")
    assert found.answer == "Always in batches of 1, below 640x480 in batches of 8"
    assert "as fast as cupy" in found.why
    assert "below 1920x1080 in batches of 1, never in batches of 8" in found.why


def test_the_verdict_says_how_many_streams_and_what_binds() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "numpy, 704x384, paced, 9 streams", "streams": 9, "passed": "no"},
        {"name": "numpy, 704x384, how many", "answer": "8 streams at p95 <= 100 ms", "binding": "encode: 2 of 2 cores"},
        {
            "name": "numpy, 1280x720, how many",
            "answer": "none",
            "why": "one stream: p95 400 ms",
            "binding": "decode: 1",
        },
    ]
    (found,) = (each for each in verdict(report(capacity=rows)) if each.question == "How many live streams?")
    assert found.answer == "numpy, 704x384: 8 streams at p95 <= 100 ms; numpy, 1280x720: none"
    assert found.why.startswith("Bound by: encode: 2 of 2 cores; one stream: p95 400 ms; decode: 1.")


def test_the_verdict_says_what_was_not_measured() -> None:
    found = answers(report(jobs=jobs()))
    assert found["Which backend?"] == "Not measured in this run (gpu-byoc bench --only engine)."
    assert found["When not to use a GPU?"] == "Not measured: there is no GPU here."
    skipped = answers(report(engine=[{"name": "numpy", "skipped": "no memory"}]))
    assert "every row of “Engine” was skipped" in skipped["Which backend?"]
    weak = answers(report(engine=[engine("640x480", 1, 10.0, unstable=True)]))
    assert "Not decided" in weak["Which backend?"]


def test_a_noisy_machine_answers_nothing() -> None:
    told = report(engine=[engine("640x480", 1, 10.0)])
    assert answers(told)["Which backend?"] == "numpy"
    told["noise"]["too_noisy"] = ["something else kept 1.5 cores busy"]
    assert answers(told)["Which backend?"] == "Not decided: the machine was too noisy."


def test_noise() -> None:
    quiet = Probe(2.0, 0.05, 0.02)
    assert noise(quiet, quiet)["too_noisy"] == []
    for before, after, words in (
        (quiet, Probe(2.0, 0.9, 0.0), "at the end, one repetition in twenty took 90% longer"),
        (Probe(2.0, 0.0, 1.2), quiet, "at the start, something else kept 1.2 cores busy"),
        (quiet, Probe(3.0, 0.0, 0.0), "50% slower at the end"),
        (quiet, Probe(1.0, 0.0, 0.0), "50% faster at the end"),
    ):
        (reason,) = noise(before, after)["too_noisy"]
        assert words in reason
    (reason,) = noise(quiet, quiet, {"Jobs": 0.2, "Media": 1.26})["too_noisy"]
    assert reason == "while “Media” ran, something else kept 1.3 cores busy"
    (reason,) = noise(quiet, quiet, {"Jobs": 0.5, "Media": 1.26})["too_noisy"]
    assert reason == "while “Jobs”, “Media” ran, something else kept up to 1.3 cores busy"


# --- files


def test_the_machine_is_named() -> None:
    told = machine()
    assert told["cores"] >= 1
    assert {"gpu-byoc", "numpy", "aiohttp", "av"} <= set(told["versions"])
    assert reports.slug(report()["machine"]) == "intel-xeon-2-cores"
    gpu = {**told, "cpu": "AMD EPYC 7763 64-Core Processor", "cores": 16, "gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}
    assert reports.slug(gpu) == "amd-epyc-7763-16-cores-nvidia-h100-80gb-hbm3"


def test_everything_is_written_and_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = reports.write(everything(), tmp_path / "out")
    assert {path.suffix for path in files} >= {".json", ".md", ".html"}
    data = tmp_path / "out" / "intel-xeon-2-cores.json"
    assert load(data) == everything()
    assert reports.write(everything(), tmp_path / "kept" / "mine.json") == [tmp_path / "kept" / "mine.json"]
    assert reports.main([str(data), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "intel-xeon-2-cores.html").exists()
    assert "written: " in capsys.readouterr().out


def test_a_figure_that_is_none_is_not_written_and_the_last_result_stays(tmp_path: Path) -> None:
    data = reports.save(report(jobs=[row("a", p50_us=1.0)]), tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        reports.write(report(jobs=[row("a", p50_us=float("nan"))]), tmp_path)
    assert load(data) == report(jobs=[row("a", p50_us=1.0)])


LINES = Plot(
    "lines", "Lines & more", "p50_us", "connections", ("target",), floor=("echo",), limit="ceiling_us", log=True
)
BARS = Plot("bars", "Bars", "p50_us", floor=("echo, 1",), series=("target",))


@pytest.mark.parametrize("plot", [LINES, BARS])
def test_pictures(plot: Plot) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gpu-byoc[bench]'")
    rows = [
        row(f"{target}, {count}", target=target, connections=count, p50_us=9000.0 * count, ceiling_us=1000.0 * count)
        for target in ("echo", "worker")
        for count in (1, 4, 64)
    ]
    rows[4]["unstable"] = True
    assert plots.png(plot, rows).startswith(b"\x89PNG")
    text = plots.svg(plot, rows)
    found = Page(text)
    assert all(link.startswith("#") for link in found.fetched)
    assert "http" not in text
    assert "var(--series-1)" in text
    assert "var(--ink)" in text
    assert not re.search(r"#0[1-4]0[1-4]0\d", text)  # every stand-in became a variable
    assert "worker" in " ".join(found.text)
    assert plots.svg(plot, rows) == text  # the same figures, the same file


@given(st.lists(st.tuples(st.floats(0, 200), st.sampled_from([12.0, 24.0])), min_size=1, max_size=8))
def test_names_beside_lines_do_not_lie_on_one_another(labels: list[tuple[float, float]]) -> None:
    wanted, heights = zip(*sorted(labels), strict=True)
    put = plots._apart(wanted, heights, 206.0)
    for (low, under), (high, over) in itertools.pairwise(zip(put, heights, strict=True)):
        assert high - low >= (under + over) / 2 - 1e-6
    assert put[-1] + heights[-1] / 2 <= 206.0 + 1e-6


def test_a_limit_keeps_its_unit_and_is_named_once_where_it_is_one_for_all() -> None:
    rows = [
        row(f"{who}, {count}", who=who, streams=count, p50_us=9000.0, limit_us=5000.0)
        for who in ("a", "b")
        for count in (1, 2)
    ]
    plot, scaled = plots._readable(Plot("n", "t", "p50_us", "streams", ("who",), limit="limit_us"), rows)
    assert plots._limits(plot, scaled) == {"limit": [(1, 5.0), (1, 5.0), (2, 5.0), (2, 5.0)]}
    scaled[0]["limit_ms"] = 4.0
    assert plots._limits(plot, scaled) == {"a limit": [(1, 4.0), (2, 5.0)], "b limit": [(1, 5.0), (2, 5.0)]}


def test_a_picture_shows_its_own_rows_only() -> None:
    rows = [
        row("a", batch=1, p50_us=1.0, size="x"),
        row("b", batch=1, size="x"),
        row("c", batch=1, p50_us=1.0, size="y"),
    ]
    assert [each["name"] for each in plots.wanted(Plot("n", "t", "p50_us", "batch", where={"size": "x"}), rows)] == [
        "a"
    ]


# --- the README


def test_the_readme_shows_what_its_file_says() -> None:
    """``make plot FILE=...`` writes it; nobody else does."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = readme.PLACE.finditer(text)
    picture = Path(found["file"]).with_suffix(".png")
    linked = picture.as_posix() if (ROOT / picture).exists() else ""
    assert found.group() == readme.block(load(ROOT / found["file"]), found["file"], linked)


def test_the_readme_is_updated_in_its_place(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gpu-byoc[bench]'")
    told = report(
        jobs=[
            row(f"{target}, {count}", target=target, connections=count, p50_us=1.0, jobs_per_second=5.0 * count)
            for target in ("bare aiohttp echo", "worker")
            for count in (1, 4, 64)
        ]
    )
    page, data = tmp_path / "README.md", tmp_path / "results" / "m.json"
    page.write_text("# Title\n\n<!-- bench: old.json -->\nold\n<!-- bench: end -->\n\nThe rest\n")
    data.parent.mkdir()
    data.write_text(json.dumps(told))
    assert reports.main([str(data), "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- bench: results/m.json -->\n")
    assert text.endswith("<!-- bench: end -->\n\nThe rest\n")
    assert "![Jobs a second over connections](results/m.png)" in text
    assert "Intel(R) Xeon(R) Processor, 2 cores" in text
    assert "| worker, 4 |" in text
    assert "| worker, 64 |" not in text
    assert (data.with_suffix(".png")).read_bytes().startswith(b"\x89PNG")


def test_a_readme_without_a_place_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'gpu-byoc[bench]'")
    (tmp_path / "README.md").write_text("# Title\n")
    with pytest.raises(ConfigError, match="has no place for it"):
        readme.update(tmp_path / "README.md", report(), tmp_path / "m.json")

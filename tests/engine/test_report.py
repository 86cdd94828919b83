"""Reports: the page of complete and incomplete runs, and the escaping of hostile content."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from cm_diffusers.engine.pictures.charts import POINTS, Line, chart, thinned
from cm_diffusers.engine.pictures.report import quality_curves, write_report
from cm_diffusers.engine.pictures.run_records import MOST_PICTURES, read_run
from tests.helpers.scripts import load_script
from tests.helpers.training_runs import run


VOID = {"meta", "img", "br", "input", "link"}
HOSTILE = "<script>alert(1)</script>\"'&$x^{$"  # the text between the dollars is not a formula


class Page(HTMLParser):
    """A page in parts; parsing checks that its elements are closed in order."""

    def __init__(self, path):
        super().__init__()
        self.text, self.open, self.tags, self.addresses, self.words = path.read_text(), [], [], [], []
        self.feed(self.text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name.split(":")[-1] in ("href", "src", "srcset", "action", "data", "poster", "background"):
                self.addresses.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())

    def says(self, words):
        return words in " ".join(filter(None, self.words))


def log_row(step, **values):
    by_level = {"0-0.01": 9 / step, "0.01-0.1": 5 / step, "10-inf": 1 / step}
    row = {"step": step, "loss": 10 / step, "loss_by_sigma": by_level, "grad_norm": 3.0, "lr": 1e-3, "skipped": 0}
    return {**row, "time": {"images_per_second": 6400.0}, **values}


def result(n, distance, **more):
    name = f"{n} step{'s' * (n > 1)}"
    return {"name": name, "num_inference_steps": n, "sigmas": [80.0] * n, "frechet_distance": distance, **more}


def make_run(folder, rows=20, **settings):
    """The folder of a run with 640 images per step and ten steps a second."""
    (folder / "samples").mkdir(parents=True)
    (folder / "pipeline" / "samples").mkdir(parents=True)
    settings = {"method": "ect", "max_train_steps": 100 * rows, "learning_rate": 1e-3, "q": 2.0, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    log = [log_row(100 * (i + 1)) for i in range(rows)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (folder / "card.json").write_text(json.dumps({"images_per_step": 640, "shape": "1 x 8 x 8", "parameters": 10**6}))
    (folder / "exported.json").write_text("{}")
    for step in (1000, 2000):
        for end in ("", "-diagnostics"):
            Image.new("RGB", (40, 20), (step // 10, 0, 0)).save(folder / "samples" / f"step-{step:07d}{end}.png")
    Image.new("RGB", (40, 20)).save(folder / "pipeline" / "samples" / "1_step.png")
    return folder


def measure(folder, *results, num_samples=1000):
    extractor = {"name": "classifier", "fingerprint": "f"}
    times = {"sampling": 12.5, "frechet_distance": 0.25}
    report = {"results": results, "num_samples": num_samples, "extractor": extractor, "time": times}
    (folder / "metrics.json").write_text(json.dumps(report))


def page_of(*folders, output=None):
    output = output or folders[0].parent / "report.html"
    runs = write_report(folders, output)
    return Page(output), runs


# --- the page ------------------------------------------------------------------------------------------------------


def test_a_real_run_has_a_page_that_needs_nothing_else(tmp_path):
    folder = run(tmp_path / "ect", max_train_steps=6, validation_steps=3)
    page, (record,) = page_of(folder)
    assert set(page.tags) & {"script", "link", "iframe", "object", "embed", "base", "form"} == set()
    assert page.addresses and all(re.match(r"data:image/png;base64,|#", address) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", page.text)
    assert [p.title for p in record.samples] == ["step 3", "step 6"] and record.diagnostics.title == "step 6"
    assert record.finished and record.step == 6 and record.hours[-1] > 0
    assert page.says("6 of 6, finished") and page.says("gradient norm") and page.says("Loss by noise level")
    assert [note for note in record.notes if "metrics" not in note] == []
    before = (tmp_path / "report.html").read_bytes()
    page_of(folder)
    assert (tmp_path / "report.html").read_bytes() == before


def test_several_runs_are_side_by_side_with_their_differences_marked(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", q=2.000001, extra=[1, 2])
    page, _ = page_of(a, b)
    rows = re.findall(r'<tr class="differs"><th scope="row">(.*?)</th>(.*?)</tr>', page.text)
    found = {name: re.findall("<td>(.*?)</td>", cells) for name, cells in rows}
    assert found == {"q": ["2.0", "2.000001"], "extra": ["", "1, 2"]}
    assert page.says("2 of 5 settings differ.")
    assert page.text.count("data:image/png") == 2 * (2 + 1 + 1)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    a, b = make_run(tmp_path / "1" / "ect"), make_run(tmp_path / "2" / "ect")
    page, _ = page_of(a, b, output=tmp_path / "new" / "report.html")
    assert page.says("1/ect") and page.says("2/ect") and str(tmp_path) not in page.text


def test_a_page_names_no_path_of_this_machine(tmp_path):
    names = {"output_dir": str(tmp_path / "a"), "train_data_dir": str(tmp_path), "dataset_name": "user/data"}
    names |= {"extra_datasets": ["digits", str(tmp_path)], "vae_name_or_path": str(tmp_path / "vae")}
    folder = make_run(tmp_path / "a", **names)
    page, _ = page_of(folder)
    assert str(tmp_path) not in page.text and page.says("user/data") and page.says("local")


def test_only_points_of_one_sampler_are_joined_and_no_chart_is_empty(tmp_path):
    folder = make_run(tmp_path / "a")
    heun = {"name": "2 steps, heun", "num_inference_steps": 2, "frechet_distance": 3.0}
    levels = {"name": "sigmas 80, 1", "num_inference_steps": 2, "frechet_distance": 4.0}
    measure(folder, result(1, 9.0), result(2, 5.0), heun, levels)
    (title, charts), *_ = quality_curves([read_run(folder, "a")])
    svg = dict(charts)["against network calls"]
    assert title == "frechet_distance" and all(name in svg for name in ("levels, heun", "sigmas 80, 1"))
    measure(folder, {"name": "1 step", "frechet_distance": 9.0})
    (_, charts), *_ = quality_curves([read_run(folder, "a")])
    assert "against network calls" not in dict(charts)


# --- curves --------------------------------------------------------------------------------------------------------


def drawn(svg, colour):
    """The points (n, 2) of the curve with this colour."""
    path = re.search(rf'<path d="([^"]*)"[^>]*stroke: {colour}', svg)[1]
    return np.array([[float(n) for n in point] for point in re.findall(r"[ML] (\S+) (\S+)", path)])


@pytest.mark.parametrize("span, scale", [(2, float), (500, math.log)])
def test_a_curve_is_where_its_values_are_and_wide_ranges_are_logarithmic(span, scale):
    x, y = [0, 1, 2, 5], [1, span, span / 2, 1.5]
    points = drawn(str(chart([Line(x, y, "#2f7ed8")], "step")), "#2f7ed8")
    for drawn_values, values in zip(points.T, (x, [scale(v) for v in y])):
        assert np.corrcoef(drawn_values, values)[0, 1] ** 2 == pytest.approx(1, abs=1e-9)
    assert points[1, 1] < points[0, 1]  # upwards


def test_long_curves_are_averaged_and_short_ones_kept():
    x, y = np.arange(10 * POINTS), np.random.default_rng(0).normal(size=10 * POINTS)
    short = thinned(x, y)
    assert short[0].shape == short[1].shape == (POINTS,)
    assert np.allclose(short[1], y.reshape(POINTS, 10).mean(1)) and short[0][0] == 4.5
    assert [part.tolist() for part in thinned([1, 2], [3.0, 5.0])] == [[1, 2], [3, 5]]
    assert [len(part) for part in thinned([], [])] == [0, 0]


def test_hours_come_from_the_rates_in_the_log(tmp_path):
    record = read_run(make_run(tmp_path / "a"), "a")  # 20 times 100 steps of 640 images at 6400 a second
    assert record.hours == pytest.approx([(i + 1) * 10 / 3600 for i in range(20)])
    assert record.hours_at(150) == pytest.approx(15 / 3600)


def test_images_per_step_may_come_from_a_checkpoint_alone(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "card.json").unlink()
    assert read_run(folder, "a").hours is None
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "state.json").write_text('{"global_batch": 320}')
    assert read_run(folder, "a").hours[-1] == pytest.approx(100 / 3600)


# --- quality -------------------------------------------------------------------------------------------------------


def test_quality_is_drawn_against_calls_steps_and_time(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    measure(a, *[result(n, 4000 / step / n, step=step) for step in (500, 1000, 2000) for n in (1, 2)])
    measure(b, result(1, 6.0, kernel_distance=0.5, kernel_distance_std=0.125))
    page, _ = page_of(a, b)
    charts = dict(re.findall(r'aria-label="(against [^"]*)">(.*?)</figure>', page.text, re.DOTALL)[:3])
    assert list(charts) == ["against network calls", "against training steps", "against hours of training"]
    assert len(drawn(charts["against network calls"], "#2f7ed8")) == 2  # for the newest step
    assert len(drawn(charts["against training steps"], "#2f7ed8")) == 3
    steps, hours = (drawn(charts[f"against {x}"], "#2f7ed8")[:, 0] for x in ("training steps", "hours of training"))
    assert np.corrcoef(steps, hours)[0, 1] ** 2 == pytest.approx(1, abs=1e-9)  # the rate is constant
    assert page.says("0.5 ± 0.125") and page.says("1000 samples, features: classifier")
    assert page.says("time in seconds: sampling 12.5, Fréchet distance 0.25") and not page.says("don't compare")


def test_measurements_that_can_t_be_compared_are_said_to_be_so(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    measure(a, result(1, 5.0))
    measure(b, result(1, 4.0), num_samples=50_000)
    assert page_of(a, b)[0].says("different numbers of samples. Don't compare")


# --- missing, damaged or hostile files -----------------------------------------------------------------------------


def test_what_is_missing_is_said_in_the_page(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text("method: ect\nmax_train_steps: 100\n")
    page, _ = page_of(folder)
    for words in (
        "nothing is logged",
        "step-*.png are missing",
        "metrics.json is missing",
        "not finished: step 0 of 100",
    ):
        assert page.says(words), words


def test_a_log_that_is_cut_off_is_shown_up_to_there(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "exported.json").unlink()
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 2100, "loss": 0.')
    page, (record,) = page_of(folder)
    assert record.step == 2000 and page.says("The last line of the log is cut off.")
    assert page.says("not finished: step 2000 of 2000")


def test_damaged_files_are_notes_and_not_errors(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "metrics.json").write_text('{"results": [{"step": "x"}, 5, {"name": []}, {"frechet_distance": NaN}]}')
    (folder / "card.json").write_text("[1")
    (folder / "config.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\nbad: {1: 2}\n")
    rows = ["[]", '{"loss": 1}', json.dumps(log_row(100, loss=None, loss_by_sigma=[1], grad_norm="x", lr=10**400))]
    rows += [
        json.dumps(log_row(200, loss=float("nan"), loss_by_sigma={".": 1, "1.2.3": True}, stage=0)),
        "\0",
        "nonsense",
    ]
    (folder / "log.jsonl").write_text("\n".join(rows))
    (folder / "samples" / "step-0001000.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    (folder / "samples" / "step-0002000.png").write_bytes(b"<svg onload='alert(1)'/>")
    page, (record,) = page_of(folder)
    for words in ("card.json can't be read", "step-0001000.png can't be read", "step-0002000.png can't be read"):
        assert page.says(words), words
    assert page.says("4 lines of the log are damaged") and record.samples == [] and page.says("x, x")


def test_only_some_of_many_pictures_are_shown_with_the_first_and_the_last(tmp_path):
    folder = make_run(tmp_path / "a")
    for step in range(10, 600, 10):
        shutil.copy(folder / "samples" / "step-0001000.png", folder / "samples" / f"step-{step:07d}.png")
    _, (record,) = page_of(folder)
    titles = [picture.title for picture in record.samples]
    assert len(titles) == MOST_PICTURES and titles[0] == "step 10" and titles[-1] == "step 2000"
    assert f"{MOST_PICTURES} of 61 sample grids are shown." in record.notes


def test_whatever_a_run_calls_things_stays_text(tmp_path):
    a = make_run(tmp_path / HOSTILE.replace("/", ""), **{HOSTILE: HOSTILE, "method": HOSTILE})
    b = make_run(tmp_path / "b")
    rows = [log_row(100 * i, loss_by_sigma={HOSTILE: i, "1-3": 2.0}, **{HOSTILE: float(i)}) for i in (1, 2, 3)]
    (a / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"shape": HOSTILE, "network": HOSTILE, "hardware": HOSTILE, "parameters": HOSTILE, "images_per_step": 1}
    (a / "card.json").write_text(json.dumps(facts))
    measure(a, {"name": HOSTILE, "num_inference_steps": 1, HOSTILE: 1.0, "step": 200}, num_samples=HOSTILE)
    page, _ = page_of(a, b)
    assert "script" not in page.tags and page.addresses
    assert page.text.count("<script") == 0 and page.text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10


def test_a_folder_that_is_no_run_ends_the_script_with_code_2(tmp_path, capsys):
    report = load_script("report")
    output = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(SystemExit, match="2"):
            report.main([str(make_run(tmp_path / f"good {name}")), str(tmp_path / name), "--output", str(output)])
        assert f"{name}' is not the folder of a run" in capsys.readouterr().err and not output.exists()
    report.main([str(tmp_path / "good empty"), "--output", str(output)])
    said = capsys.readouterr().out
    assert f"Saved {output}." in said and "good empty: There are no metrics" in said and output.exists()


@pytest.mark.slow
def test_in_a_browser_the_page_is_light_or_dark_and_no_wider_than_its_window(tmp_path):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no Chromium here: apt-get install chromium")
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", name="x" * 500)
    measure(a, *[result(n, 5.0 / n) for n in (1, 2)])
    page_of(a, b)
    frame = '<body style="margin: 0"><iframe src="report.html" style="border: 0; width: 390px; height: 8000px">'
    (tmp_path / "phone.html").write_text(frame)
    for scheme, back in (("1", (255, 255, 255)), ("0", (20, 23, 28))):  # light, dark
        for name, width in (("report", 1280), ("phone", 500)):
            picture = tmp_path / f"{name}{scheme}.png"
            flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},8000"]
            flags += [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}"]
            subprocess.run([chromium, *flags, f"file://{tmp_path / name}.html"], check=True, capture_output=True)
            pixels = np.asarray(Image.open(picture).convert("RGB"))[:, : 390 if name == "phone" else 1280]
            assert tuple(pixels[2, 2]) == back
            assert (pixels[:, -4:] == back).all()  # nothing reaches the right margin, not even a scroll bar
            assert (pixels != back).any(-1).mean() > 0.01

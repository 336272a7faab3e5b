# SPDX-License-Identifier: Apache-2.0
"""The README's figures against the results that they are of. Nothing is measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxwin.tuner import measure, problems

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results"
if not (ROOT / "README.md").exists():
    pytest.skip("the tests are not in a checkout", allow_module_level=True)
README = (ROOT / "README.md").read_text()


def _read(name: str) -> Any:
    (path,) = RESULTS.glob(f"{name}_*.json")  # of one machine or another
    return json.loads(path.read_text())


def _section(title: str) -> str:
    return re.split(r"\n##+ ", README.split(f" {title}\n")[1])[0]


def _lines(*sections: str) -> list[list[str]]:
    """The lines of the tables in sections of the README, as cells."""
    lines = [line for text in sections for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _numbers(text: str) -> list[str]:
    return re.findall(r"(?<!\w)\d+(?:\.\d+)?", text)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_whole_and_shown(path: Path) -> None:
    data = json.loads(path.read_text())
    assert data.get("complete", True)
    for part in data.get("comparisons", []):
        assert part["complete"], part["name"]
    # By a pattern such as `compare_*`, or by the preset or model that the README names.
    assert path.stem.split("_")[0].rstrip("s") in README


def _spread(values: list[float], mean: float) -> str:
    return f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def test_layers_of_the_papers() -> None:
    names = {"forward": "fwd", "input gradient": "dx", "weight gradient": "dw"}
    peers = ("jaxwin", "xla", "xla-eigen", "onednn", "onednn-packed", "ort", "xnnpack")
    table = {cells[0]: cells for cells in _lines(_section("Measure")) if cells[0] in names}
    assert table.keys() == names.keys()
    for name, (_, *gflops, against) in table.items():
        data = _read(f"paper_b1_t1_{names[name]}")
        means = data["means"][names[name]]
        found = [means["gflops"].get(peer) for peer in (*peers, "torch-native")]
        assert gflops == [f"{mean['geomean']:.0f}" if mean else "" for mean in found]
        ratios = [row["ratio_to_best"] for row in data["rows"]]
        assert against == _spread(ratios, means["ratio_to_best"])


def test_kinds_of_layers() -> None:
    kinds = "depthwise grouped pointwise transposed dilated conv3d audio1d"
    names = kinds.split()
    table = {cells[0]: cells for cells in _lines(_table("| preset | against the best |"))[2:]}
    assert list(table) == names
    for name, (_, best, xla, _) in table.items():
        data = _read(f"{name}_b1_t1_fwd")
        ratios = [row["ratio_to_best"] for row in data["rows"]]
        assert best == _spread(ratios, data["means"]["fwd"]["ratio_to_best"])
        mean = measure.geomean(row["ratios"]["xla"] for row in data["rows"])
        assert xla == f"{mean:.2g}"


def test_dtypes() -> None:
    (_, *dtypes), _, *lines = _lines(_table("| | bfloat16 |"))
    assert lines
    for column, dtype in enumerate(dtypes, 1):
        ratios = {row["name"]: row["ratio_to_best"] for row in _read(f"dtype_{dtype}")["rows"]}
        for cells in lines:
            found = [ratios[conv.name] for conv in problems.preset(cells[0])]
            assert cells[column] == _spread(found, measure.geomean(found))


def test_networks() -> None:
    packed = ("jaxwin", "jaxwin-fused", "jaxwin-packed", "xla", "xla-eigen", "torch")
    training = ("jaxwin", "jaxwin-fused", "xla", "xla-eigen", "torch")
    columns = {
        "inference_t1": (*packed, "torch-frozen"),
        "training_t1": training,
        "training_kept_t1": training,
    }
    lines = [cells for cells in _lines(_section("Measure")) if ", batch" in cells[0]]
    for kind, names in columns.items():
        for row in _read(f"models_{kind}")["rows"]:
            taken = [f"{row['cells'][name]['median_ns'] / 1e6:.0f}" for name in names]
            assert any(cells[1:-1] == taken for cells in lines), (row["name"], taken)


def test_a_second_machine() -> None:
    found: dict[str, list[str]] = {}
    for path in RESULTS.glob("graniterapids_*.json"):
        data, subject = json.loads(path.read_text()), path.stem.split("_")[1]
        for label, ratio in _second_machine(data, subject, path.stem):
            found.setdefault(label, ["", ""])[data["options"]["threads"] - 1] = ratio
    header, _, *lines = _lines(_table("| Granite Rapids |"))
    assert header[1:] == ["one thread", "two threads"]
    assert {label: cells for label, *cells in lines} == found


def _second_machine(data: Any, subject: str, stem: str) -> Iterator[tuple[str, str]]:
    """Lines of its table, and the ratios to the best library, that one file gives."""
    if subject in ("inference", "training"):
        kept = ", memory kept" if "kept" in stem else ""
        for row in data["rows"]:
            name = {"resnet50": "ResNet-50", "mobilenetv2": "MobileNetV2", "unet": "U-Net"}.get(
                row["name"].removesuffix("-train"), "DCGAN"
            )
            images = "one image" if row["batch"] == 1 else f"{row['batch']} images"
            what = f"training{kept}" if subject == "training" else images
            yield f"{name}, {what}", f"{row['ratio_to_best']:.2f}"
        return
    names = {"fwd": "forward", "dx": "input gradient", "dw": "weight gradient"}
    for direction, means in data["means"].items():
        rows = [row for row in data["rows"] if row["direction"] == direction]
        images = ", 8 images" if "_b8_" in stem else ""
        plain = subject != "paper" and direction == "fwd"
        label = subject if plain else f"{subject}, {names[direction]}{images}"
        ratios = [row["ratio_to_best"] for row in rows]
        yield label, _spread(ratios, means["ratio_to_best"])


def test_algorithms() -> None:
    header, _, *lines = _lines(_table("| | auto |"))
    for layout, cells in zip(("nhwc", "nchw"), lines, strict=True):
        means = _read(f"algorithms_b1_t1_{layout}")["means"]["fwd"]["gflops"]
        suffix = "col" if layout == "nhwc" else "row"
        for name, cell in zip(header[1:], cells[1:], strict=True):
            peer = (
                "jaxwin" if name == "auto" else f"jaxwin:{name.replace('kn2 -', f'kn2{suffix}_')}"
            )
            found = means.get(peer)
            assert cell == (f"{found['geomean']:.0f}" if found else "")


def _table(begin: str) -> str:
    return begin + README.split(begin)[1].split("\n\n")[0]


def test_layouts() -> None:
    lines = _lines(_section("Layouts"))
    names = {"forward": "fwd", "input gradient": "dx", "weight gradient": "dw"}
    relative = _read("layout_b16_t1")["relative"]
    table = {cells[0]: cells[1:] for cells in lines if cells[0] in names}
    assert table.keys() == names.keys()
    for name, cells in table.items():
        for layout, cell in zip(("NCHW", "CHWN", "CHWN8", "CHWN16"), cells, strict=True):
            assert cell == "{:.2f} ({:.2f} to {:.2f})".format(*relative[names[name]][layout])


def test_comparisons() -> None:
    """Every number of the column "here" is one of a figure that was measured."""
    found: set[str] = set()
    for path in RESULTS.glob("compare_*.json"):
        for part in json.loads(path.read_text())["comparisons"]:
            for figure in part["figures"]:
                found |= set(_numbers(figure["ours"] or ""))
    (header, _, *lines) = _lines(_section("The papers' comparisons"))
    assert header[2] == "here" and len(lines) > 15
    for what, _, here in lines:
        assert set(_numbers(here)) <= found, what


def test_algorithms_with_fewer_products() -> None:
    lines = _lines(_section("Fewer products, other numbers"))
    table = {cells[0].split(",")[0]: cells[1:] for cells in lines if cells[0].startswith("cv")}
    results = [_read(f"families_b{batch}_t1_fwd")["rows"] for batch in (1, 8)]
    assert len(table) == len(results[0])
    for cells, rows in zip(table.values(), zip(*results, strict=True), strict=True):
        for name, cell in zip(("winograd", "sfc"), cells, strict=True):
            ratios = []
            for row in rows:
                samples = {peer: c["samples_ns"] for peer, c in row["cells"].items()}
                ours = samples[f"jaxwin:{name}"]
                theirs = (samples[f"jaxwin:{peer}"] for peer in ("direct", "rows"))
                ratios.append(min(measure.relative(ours, other) for other in theirs))
            assert cell == ", ".join(f"{ratio:.2f}" for ratio in ratios)


def test_smallest_convolutions() -> None:
    rows = _read("tiny_b1_t1_fwd")["rows"]
    lines = [cells for cells in _lines(_section("Measure")) if len(cells) == 5]
    lines = lines[[cells[2] for cells in lines].index("in a loop") + 2 :][: len(rows)]
    for cells, row in zip(lines, rows, strict=True):
        taken = [row["cells"][p]["median_ns"] / 1e3 for p in ("jaxwin", "xla", "xla-eigen")]
        loop = row["cells"]["jaxwin-loop"]["median_ns"] / 1e3
        assert cells[1:2] + cells[3:] == [f"{us:.0f}" for us in taken]
        assert cells[2] == f"{loop:.1f}"


def test_fresh_memory() -> None:
    def gflops(name: str, peer: str) -> float:
        (row,) = _read(name)["rows"]
        return row["cells"][peer]["gflops"]

    names = ("memory_b8_t1", "memory_huge_b8_t1", "memory_kept_b8_t1")
    donated = [gflops(name, "jaxwin-donated") for name in names]
    expected = [f"{gflops(name, 'jaxwin'):.0f}" for name in names]
    expected.append(f"{min(donated):.0f} to {max(donated):.0f}")
    lines = _lines(README.split("**Why is a large output slow?**")[1].split("\n**")[0])
    assert [cells[1] for cells in lines[2:]] == expected

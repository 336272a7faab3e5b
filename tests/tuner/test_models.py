# SPDX-License-Identifier: Apache-2.0
"""`jaxwin-tune bench --model`: the networks are what their names say, and alike everywhere."""

from __future__ import annotations

import collections
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import jaxwin
from jaxwin.tuner import bench, machine, model_bench, models, peers, problems
from jaxwin.tuner.cli import main

FAST = ("--rounds", "2", "--min-time", "0.01", "--threads", "1")
JAX = ["xla", "xla-eigen", "xla-folded", "jaxwin", "jaxwin-fused", "jaxwin-packed"]
TORCH = ["torch", "torch-frozen"]


@pytest.fixture
def not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the tests keeps its CPUs."""
    monkeypatch.setattr(machine, "pin", lambda threads: machine.usable_cpus()[:threads])
    monkeypatch.setattr(machine, "pool_threads", lambda: 0)


def _run(*arguments: str):
    return CliRunner().invoke(main, ["bench", *arguments])


def _abstract_layers(name: str):
    """Networks' layers without their numbers."""
    model = models.MODELS[name]
    draw = models._draw
    try:
        models._draw = lambda part, shape, *_: jax.ShapeDtypeStruct(shape, np.float32)
        found = models.layers(model, np.random.default_rng(0))
    finally:
        models._draw = draw
    return {
        network: [{k: v for k, v in layer.items() if k != "kind"} for layer in of]
        for network, of in found.items()
    }


@pytest.mark.parametrize(("name", "count"), [("resnet50", 25_557_032), ("mobilenetv2", 3_504_872)])
def test_parameters_are_as_many_as_published(name: str, count: int) -> None:
    (layers,) = _abstract_layers(name).values()
    trained = [a for layer in layers for k, a in layer.items() if k not in ("mean", "var")]
    assert sum(a.size for a in trained) == count


@pytest.mark.parametrize("name", ["resnet50", "mobilenetv2", "unet"])
def test_convolutions_are_those_of_the_preset(name: str) -> None:
    model = models.MODELS[name]
    (layers,) = _abstract_layers(name).values()
    x = jax.ShapeDtypeStruct((1, *model.inputs[0]), jnp.float32)
    fn = jaxwin.accelerate(models.jax_inference(model))
    found = collections.Counter()
    for row in jaxwin.explain(fn, layers, x):
        found[str(row.problem)] += row.count
    expected = collections.Counter()
    for conv in problems.preset(name):
        expected[str(conv)] += conv.count
    assert found == expected


def test_every_way_of_inference_gives_the_same(not_pinned: None) -> None:
    chosen = JAX + (TORCH if importlib.util.find_spec("torch") else [])
    done = _run("--model", "small", *FAST, "--peers", ",".join(chosen), "--json", "-")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["schema_version"] == bench.SCHEMA_VERSION
    (row,) = data["rows"]
    assert (row["name"], row["batch"], row["direction"]) == ("small", 2, "inference")
    for name in chosen:
        cell = row["cells"][name]
        assert cell["status"] == "ok", (name, cell["reason"])
        assert cell["error"] < 1e-5
        assert cell["median_ns"] > 0
    ours = min(row["cells"][name]["median_ns"] for name in chosen if peers.is_ours(name))
    others = {name: row["cells"][name]["median_ns"] for name in chosen if not peers.is_ours(name)}
    assert row["best_peer"] == min(others, key=others.__getitem__)
    assert row["ratio_to_best"] == pytest.approx(min(others.values()) / ours)


def test_every_way_of_training_gives_the_same(not_pinned: None) -> None:
    chosen = ["xla", "jaxwin", "jaxwin-fused"]
    chosen += ["torch"] if importlib.util.find_spec("torch") else []
    arguments = ("--model", "small-train", *FAST, "--json", "-", "--peers")
    done = _run(*arguments, ",".join([*chosen, "jaxwin-packed"]))
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["rows"]
    for name in chosen:
        assert row["cells"][name]["status"] == "ok", (name, row["cells"][name]["reason"])
        assert row["cells"][name]["error"] < 1e-3
    assert row["cells"]["jaxwin-packed"]["status"] == "unsupported"


@pytest.mark.parametrize("name", ["resnet50", "unet"])
def test_both_frameworks_have_the_same_network(name: str) -> None:
    """The shape of large ones on small images, in JAX and in PyTorch."""
    pytest.importorskip("torch")
    network = {
        "resnet50": functools.partial(models.resnet, blocks=(1, 2, 1, 1), width=4, classes=10),
        "unet": functools.partial(models.unet, width=4, depth=2),
    }[name]
    model = models.Model("less of it", 1, {"net": network}, ((32, 32, 3),))
    rng = np.random.default_rng(0)
    layers, inputs = models.layers(model, rng), models.inputs(model, 2, rng)
    task = model_bench.Task(name, model, 2, 1, layers, inputs)
    expected = model_bench.make("xla").prepare_model(task).result
    for peer in ("torch", "jaxwin-fused", "jaxwin-packed"):
        got = model_bench.make(peer).prepare_model(task).result
        assert model_bench.difference(got, expected) < 1e-5


@pytest.mark.parametrize("name", ["small", "small-train"])
def test_a_wrong_layer_is_found(
    name: str, not_pinned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(model_bench.Xla):
        def prepare_model(self, task):
            layers = {
                network: [
                    layer | {"w": layer["w"] * (1.5 if number == 1 else 1.0)}
                    for number, layer in enumerate(of)
                ]
                for network, of in task.layers.items()
            }
            other = model_bench.Task(
                task.name, task.model, task.batch, task.threads, layers, task.inputs
            )
            return super().prepare_model(other)

    monkeypatch.setitem(model_bench._REGISTRY, "jaxwin", Wrong)
    done = _run("--model", name, *FAST, "--peers", "jaxwin", "--json", "-")
    assert done.exit_code == 1
    (row,) = json.loads(done.stdout)["rows"]
    cell = row["cells"]["jaxwin"]
    assert (cell["status"], cell["median_ns"]) == ("wrong", None)


def test_a_missing_library_is_named(not_pinned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_bench.Torch, "modules", ("no_such_module_at_all",))
    done = _run("--model", "small", *FAST, "--peers", "torch,jaxwin")
    assert done.exit_code == 0
    assert "missing peer torch: " in done.stderr
    assert "no_such_module_at_all" in done.stdout


def test_tables_and_batches(not_pinned: None) -> None:
    arguments = ("--model", "small", "--batch", "1,3", *FAST, "--peers", "xla,jaxwin")
    done = _run(*arguments, "--markdown", "-")
    assert done.exit_code == 0, done.output
    head = "| model | batch | xla | jaxwin | best peer | jaxwin / best | jaxwin / xla |"
    assert head in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| small | ")]
    assert [row.split(" | ")[1] for row in rows] == ["1", "3"] * 3  # times, memory, faults
    assert "[2/2] small b3" in done.stderr
    assert _run(*arguments, "--fail-under", "1e9").exit_code == 1


def test_dry_run() -> None:
    done = _run("--model", "unet-train", "--model", "resnet50", "--batch", "1,8", "--dry-run")
    assert done.output.splitlines() == [
        f"{name}: {models.MODELS[name].summary}, batch {batch}"
        for name in ("unet-train", "resnet50")
        for batch in (1, 8)
    ]


@pytest.mark.parametrize(
    ("arguments", "blame"),
    [
        (("--model", "nonsense"), "nonsense"),
        (("--model", "small", "56x56 c64 k64 w3"), "SHAPE"),
        (("--model", "small", "--preset", "tiny"), "--preset"),
        (("--model", "small", "--layout", "nchw"), "--layout"),
        (("--model", "small", "--peers", "ort"), "'ort'"),
        (("--peers", "torch-frozen", "56x56 c64 k64 w3"), "'torch-frozen'"),
        (("--batch", "1,2", "56x56 c64 k64 w3"), "--batch"),
        (("--model", "small", "--batch", "0"), "below 1"),
        (("--model", "small", "--peers", "jaxwin", "--fail-under", "1"), "--fail-under"),
    ],
)
def test_wrong_usage_exits_with_two(arguments: tuple[str, ...], blame: str) -> None:
    done = _run(*arguments)
    assert done.exit_code == 2
    assert blame in done.output.splitlines()[-1]
    assert "Traceback" not in done.output


def test_difference() -> None:
    ones = np.ones(4, np.float32)
    assert model_bench.difference([ones], [ones]) == 0
    assert model_bench.difference([ones * 1.5], [ones]) == pytest.approx(0.5)
    assert model_bench.difference([ones[:3]], [ones]) == float("inf")
    assert model_bench.difference([ones * np.nan], [ones]) == float("inf")
    # the first array is the losses; what is next to nothing is measured by the largest
    big = ones * 1000
    assert model_bench.difference([ones, big, ones * 0.01], [ones, big, ones * 0]) < 0.02

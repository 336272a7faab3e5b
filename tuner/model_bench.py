# SPDX-License-Identifier: Apache-2.0
"""Whole networks through jaxwin, XLA and PyTorch: the same numbers, threads and process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxwin
from jaxwin.tuner import bench, measure, models
from jaxwin.tuner.measure import Timed
from jaxwin.tuner.models import Model
from jaxwin.tuner.peers import Peer, Unsupported, XlaEigen, is_ours

Array = NDArray[Any]
# Largest difference that still is a right answer, relative to the norm: rounding grows through
# the layers, most where gradients pass normalisations over few values.
TOLERANCE = {False: 1e-4, True: 5e-2}


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its numbers: layers by network (channels last), and inputs."""

    name: str
    model: Model
    batch: int
    threads: int
    layers: dict[str, models.Layers]
    inputs: list[Array]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A peer ready to run a model.

    result: what its first run gave: the output, or of a training step the losses and then each
    parameter's momentum, channels last.
    """

    timed: Timed
    result: list[Array]
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


_REGISTRY: dict[str, type[_ModelPeer]] = {}


def names() -> tuple[str, ...]:
    """Names of all peers, in the order of tables."""
    return tuple(_REGISTRY)


def summaries() -> dict[str, str]:
    """One line about each peer."""
    return {name: peer.summary for name, peer in _REGISTRY.items()}


def make(name: str) -> _ModelPeer:
    """The peer of this name.

    Raises:
        KeyError: there is none.
    """
    return _REGISTRY[name]()


class _ModelPeer(Peer):
    """A way to run a whole model."""

    training: ClassVar[bool] = True  # whether it can train

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            _REGISTRY[cls.name] = cls

    def prepare_model(self, task: Task) -> Prepared:
        """Everything that a user does once, and a first run.

        Raises:
            Unsupported: it does not run such a model.
        """
        raise NotImplementedError


class _JaxModel(_ModelPeer):
    options: ClassVar[dict[str, Any]] = {}
    folds: ClassVar[bool] = False
    net: ClassVar[type[models.JaxNet]] = models.JaxNet  # of inference
    training_net: ClassVar[type[models.JaxNet]] = models.JaxNet

    def function(self, model: Model) -> Callable[..., Any]:
        if model.training:
            return models.jax_training(model, self.training_net)
        return models.jax_inference(model, self.net)

    def prepare_model(self, task: Task) -> Prepared:
        model = task.model
        if model.training and not self.training:
            raise Unsupported("inference only")
        fn = self.function(model)
        folds = self.folds and not model.training
        layers = {
            name: models.arrays(models.folded(of) if folds else of)
            for name, of in task.layers.items()
        }
        data = [jnp.asarray(x) for x in task.inputs]
        if self.packs_ahead:
            layers = {name: models.packed(model, of, data[0]) for name, of in layers.items()}
        args: tuple[Any, ...]
        if model.training:
            args = ((layers, jax.tree.map(jnp.zeros_like, layers)), data)
        else:
            args = (*layers.values(), *data)
        program = jax.jit(fn, donate_argnums=0 if model.training else ())
        compiled: Any = program.lower(*args).compile(compiler_options=self.options)
        ready: Any = jax.block_until_ready
        memory = compiled.memory_analysis()
        facts = {"workspace_bytes": int(memory.temp_size_in_bytes)}
        if not model.training:

            def infer() -> Any:
                return ready(compiled(*args))

            return Prepared(Timed(infer), [np.asarray(infer())], facts)
        state, losses = ready(compiled(*args))
        result = [np.asarray(losses)]
        # Copies: the next step takes the memory.
        momenta = state[1]
        result += [
            np.array(layer[part])
            for name in sorted(momenta)
            for layer in momenta[name]
            for part in sorted(layer)
        ]

        def train() -> Any:
            nonlocal state
            state, losses = compiled(state, data)
            ready((state, losses))

        return Prepared(Timed(train), result, facts)


class Xla(_JaxModel):
    """What a user of JAX gets."""

    name = "xla"
    summary = "jax.lax with default flags"


class XlaWithoutYnn(_JaxModel):
    """XLA without YNNPACK."""

    name = "xla-eigen"
    summary = XlaEigen.summary
    options: ClassVar[dict[str, Any]] = XlaEigen.options


class XlaFolded(_JaxModel):
    """What XLA makes of the folded network."""

    name = "xla-folded"
    summary = "jax.lax, normalisation folded into the weights; inference only"
    training = False
    folds = True


class Jaxwin(_JaxModel):
    """The network for `jax.lax`, unchanged."""

    name = "jaxwin"
    summary = "the same through jaxwin.accelerate"

    def function(self, model: Model) -> Callable[..., Any]:
        return jaxwin.accelerate(super().function(model))


class JaxwinFused(Jaxwin):
    """What the user of jaxwin writes."""

    name = "jaxwin-fused"
    summary = (
        "jaxwin.conv with bias, residual and activation, normalisation folded; in training "
        "jaxwin.accelerate and jaxwin.batch_norm"
    )
    folds = True
    net: ClassVar[type[models.JaxNet]] = models.FusedNet
    training_net: ClassVar[type[models.JaxNet]] = models.FusedTrainingNet


class JaxwinPacked(JaxwinFused):
    """The same with `jaxwin.pack`."""

    name = "jaxwin-packed"
    summary = "as jaxwin-fused, weights packed before; inference only"
    training = False
    packs_ahead = True


class _TorchModel(_ModelPeer):
    modules = ("torch",)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The state of torch in which inference runs."""
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit says that torch.compile is to follow it
            with torch.inference_mode():
                yield

    def prepare_model(self, task: Task) -> Prepared:
        import torch

        torch.set_num_threads(task.threads)
        if task.model.training and not self.training:
            raise Unsupported("inference only")
        layers = {name: [_torch_layer(part) for part in of] for name, of in task.layers.items()}
        data = [_torch_input(x) for x in task.inputs]
        if task.model.training:
            return self.train(task, layers, data)
        (network,), (own,) = task.model.networks.values(), layers.values()
        with self.around():
            call = self.infer(network, own, data[0])
            for _ in range(3):  # a traced program is compiled by its first runs
                out = call()
            return Prepared(Timed(call, self.around), [_from_torch(out)])

    def infer(self, network: Any, layers: models.Layers, x: Any) -> Callable[[], Any]:
        net = models.torch_net()
        return lambda: network(net(layers), x)

    def train(self, task: Task, layers: dict[str, models.Layers], data: list[Any]) -> Prepared:
        import torch

        net = models.torch_net()
        tensors = {name: [t for of in every for t in of.values()] for name, every in layers.items()}
        optimizers = {
            name: torch.optim.SGD(every, lr=models.LEARNING_RATE, momentum=models.MOMENTUM)
            for name, every in tensors.items()
        }

        def apply(name: str, x: Any) -> Any:
            return task.model.networks[name](net(layers[name], training=True), x)

        def step() -> list[Any]:
            losses = []
            for moving, loss in task.model.steps:
                for name, every in tensors.items():
                    for tensor in every:
                        tensor.requires_grad_(name == moving)
                value = loss(net([]), apply, data)
                optimizers[moving].zero_grad()
                value.backward()
                optimizers[moving].step()
                losses.append(value.detach())
            return losses

        result = [np.array([float(value) for value in step()])]
        for name in sorted(layers):
            momenta = optimizers[name].state
            for layer, original in zip(layers[name], task.layers[name], strict=True):
                for part in sorted(layer):
                    array = momenta[layer[part]]["momentum_buffer"].numpy()
                    if part == "w":
                        array = models.from_torch_weights(array, original["kind"])
                    result.append(np.array(array))
        return Prepared(Timed(step), result)


class Torch(_TorchModel):
    """PyTorch as it is."""

    name = "torch"
    summary = "PyTorch, channels last (oneDNN)"


class TorchFrozen(_TorchModel):
    """The form that PyTorch's TorchScript makes for inference."""

    name = "torch-frozen"
    summary = "torch.jit.trace, freeze and optimize_for_inference, channels last; inference only"
    training = False
    packs_ahead = True

    def infer(self, network: Any, layers: models.Layers, x: Any) -> Callable[[], Any]:
        import torch

        net = models.torch_net()

        class Module(torch.nn.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                for number, of in enumerate(layers):
                    for part, tensor in of.items():
                        self.register_buffer(f"{part}_{number}", tensor.clone())

            def forward(self, x: Any) -> Any:
                own = [
                    {part: getattr(self, f"{part}_{number}") for part in of}
                    for number, of in enumerate(layers)
                ]
                return network(net(own), x)

        traced = torch.jit.trace(Module().eval(), x.clone())
        frozen = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        return lambda: frozen(x)


def _torch_layer(layer: models.Layer) -> models.Layer:
    import torch

    found = {}
    for part, array in layer.items():
        if part == "kind":
            continue
        if part == "w":
            array = models.to_torch_weights(array, layer["kind"])
        tensor = torch.from_numpy(np.array(array, order="C"))
        found[part] = (
            tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        )
    return found


def _torch_input(x: Array) -> Any:
    import torch

    tensor = torch.from_numpy(x.copy())
    if tensor.ndim != 4:
        return tensor
    return tensor.movedim(-1, 1).contiguous(memory_format=torch.channels_last)


def _from_torch(tensor: Any) -> Array:
    array: Array = tensor.numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


# --- running ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Row(bench.Row):
    """One model, and what the peers did with it."""

    batch: int = 1

    def form(self, peer: str, alike: bool) -> str | None:
        """The fastest form of jaxwin; alike: of those that pack weights when the peer does."""
        ahead = make(peer).packs_ahead
        ours = {
            name: time
            for name in self.cells
            if is_ours(name) and (not alike or make(name).packs_ahead == ahead)
            if (time := self.time(name)) is not None
        }
        return min(ours, key=lambda name: ours[name]) if ours else None


def run(
    result: bench.Result,
    chosen: Iterable[tuple[str, int]],
    progress: Callable[[str, str], None] = lambda row, what: None,
) -> None:
    """Measures models by name with a batch, adding rows to `result`; may be interrupted."""
    rng = random.Random(result.options.seed)
    with bench.watched(result):
        for name, batch in chosen:
            title = f"{name} b{batch}"
            progress(title, "")
            detail = functools.partial(progress, title)
            result.rows.append(_row(result, name, batch, rng, detail))
        result.complete = True


def _row(
    result: bench.Result,
    name: str,
    batch: int,
    rng: random.Random,
    progress: Callable[[str], None],
) -> Row:
    options = result.options
    model = models.MODELS[name]
    data = np.random.default_rng(options.seed)
    layers = models.layers(model, data)
    task = Task(name, model, batch, options.threads, layers, models.inputs(model, batch, data))
    progress("reference")
    reference: Prepared | None = Xla().prepare_model(task)
    assert reference is not None
    expected = reference.result
    cells: dict[str, bench.Cell] = {}
    timed: dict[str, Timed] = {}
    for peer in result.peers:
        progress(f"{peer}: preparing")
        known = reference if peer == Xla.name else None
        cells[peer], found = _prepare(peer, task, expected, known)
        if found is not None:
            timed[peer] = found
    reference = known = None  # what is not timed has large weights
    timed[bench.PEAK], peak_flops = bench.peak_loop()
    samples = measure.interleave(
        timed,
        threads=options.threads,
        rounds=options.rounds,
        min_seconds=options.min_seconds,
        budget_seconds=options.budget_seconds,
        rng=rng,
        progress=progress,
    )
    peak = peak_flops / samples.pop(bench.PEAK).median_ns * options.threads
    flops = _flops(task)
    for peer, taken in samples.items():
        bench.fill(cells[peer], taken, flops)
        if cells[peer].gflops:
            cells[peer].peak_share = (cells[peer].gflops or 0.0) / peak
    return Row(
        name=name,
        problem=model.summary,
        direction="training" if model.training else "inference",
        dtype="float32",
        layout=options.layout,
        count=1,
        flops=flops,
        result_bytes=sum(array.nbytes for array in expected),
        peak_gflops=peak,
        cells=cells,
        batch=batch,
    )


def _flops(task: Task) -> float:
    """Of the convolutions."""
    model = task.model
    layers: dict[str, Any] = {name: models.arrays(of) for name, of in task.layers.items()}
    fn: Callable[..., Any]
    if model.training:
        fn, args = models.jax_training(model), ((layers, layers), task.inputs)
    else:
        fn, args = models.jax_inference(model), (*layers.values(), *task.inputs)
    rows = jaxwin.explain(jaxwin.accelerate(fn), *args)
    return sum(row.problem.flops * row.count for row in rows)


def _prepare(
    name: str, task: Task, expected: Sequence[Array], known: Prepared | None
) -> tuple[bench.Cell, Timed | None]:
    try:
        prepared = known or make(name).prepare_model(task)
    except Unsupported as reason:
        return bench.Cell("unsupported", str(reason)), None
    except Exception as error:  # any library may fail in its own way; the others go on
        return bench.Cell("failed", measure.first_line(error)), None
    cell = bench.Cell("ok", **prepared.facts)
    cell.error = difference(prepared.result, expected)
    if not cell.error <= TOLERANCE[task.model.training]:
        cell.status, cell.reason = "wrong", f"differs by {cell.error:.1e} of the norm"
        return cell, None
    return cell, prepared.timed


def difference(got: Sequence[Array], expected: Sequence[Array]) -> float:
    """Norm of the difference relative to the norm, of the worst array; infinite for bad shapes.

    An array that is next to nothing beside the others is measured by the largest norm.
    """
    if [a.shape for a in got] != [b.shape for b in expected]:
        return float("inf")
    norms = [float(np.linalg.norm(b.astype(np.float64))) for b in expected]
    least = 1e-3 * max(norms[1:], default=norms[0])
    worst = 0.0
    for a, b, norm in zip(got, expected, norms, strict=True):
        off = float(np.linalg.norm(a.astype(np.float64) - b))
        worst = max(worst, off / max(norm, least)) if np.isfinite(off) else float("inf")
    return worst


# --- text ------------------------------------------------------------------------------------


def grids(result: bench.Result) -> dict[str, bench.Grid]:
    """Title -> header and lines."""
    having = [
        n for n in result.peers if any(row.cells[n].status != "unsupported" for row in result.rows)
    ]
    compared = bench.comparisons(having, make)
    ratios = [name for column in compared for name in column.header]
    speeds: bench.Grid = [["model", "batch", *having, *ratios]]
    memory: bench.Grid = [["model", "batch", *having]]
    faults: bench.Grid = [["model", "batch", *having]]
    for row in result.rows:
        assert isinstance(row, Row)
        line = [row.name, str(row.batch), *(_time(row.cells[name]) for name in having)]
        speeds.append(line + [text for column in compared for text in column.texts(row)])
        known = (row.cells[name].workspace_bytes for name in having)
        memory.append([row.name, str(row.batch), *map(bench.mib, known)])
        counts = (row.cells[name].faults for name in having)
        texts = ("-" if count is None else f"{count:.0f}" for count in counts)
        faults.append([row.name, str(row.batch), *texts])
    return {
        "whole models, ms (median ± median absolute deviation, share of the FMA peak)": speeds,
        "whole models, XLA's temporary memory in MiB": memory,
        "whole models, page faults per run": faults,
    }


def _time(cell: bench.Cell) -> str:
    if cell.status != "ok" or cell.median_ns is None:
        return {"unsupported": "-", "ok": "-"}.get(cell.status, cell.status.upper())
    digits = 1 if cell.median_ns >= 1e8 else 2
    share = "" if cell.peak_share is None else f" ({cell.peak_share:.0%})"
    mad = (cell.mad_ns or 0.0) / 1e6
    return f"{cell.median_ns / 1e6:.{digits}f} ± {mad:.{digits}f}{share}"


BEST = (
    "jaxwin / best: how many times faster jaxwin's faster form is than the fastest other peer; the "
    "share of the peak counts the convolutions' arithmetic alone"
)


def notes(result: bench.Result) -> list[str]:
    """Lines below the tables."""
    return bench.notes(result, BEST, make)


def prepare(chosen: Sequence[str], options: bench.Options) -> bench.Result:
    """As `bench.prepare`, for the peers of models."""
    return bench.prepare(chosen, options, make)


def select(chosen: Sequence[str]) -> list[str]:
    """Peers by name, in the registry's order.

    Raises:
        ValueError: a name is unknown; one line.
    """
    for name in chosen:
        if name not in _REGISTRY:
            raise ValueError(f"{name!r} is not one of {', '.join(_REGISTRY)} (peers of --model)")
    return [name for name in _REGISTRY if name in chosen]

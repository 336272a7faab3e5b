# SPDX-License-Identifier: Apache-2.0
"""Layouts of activations: their names, conversions, and what each is to `lax`.

A blocked layout (CHWN8) holds the images in blocks: (ceil(N / 8), C, spatial..., 8). To lax that is
CHWN with one spatial dimension more, the blocks, along which the window is a single element. So its
convolutions, and all their derivatives, are convolutions that everything else here knows already.

Arrays stay plain arrays; that only some images of the last block are real is not written on them.
`from_layout` is told the batch size, which a program knows from its input.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

# By rank, one to three spatial dimensions; those of two stand for their family at any rank.
_SPATIAL = {1: "W", 2: "HW", 3: "DHW"}
_BLOCKS = (8, 16)


class Layout(NamedTuple):
    """`order`: "last" (N spatial C), "first" (N C spatial) or "images" (C spatial N), the images
    split into blocks of `block`, whose number comes first; 0: not split.
    """

    order: str
    block: int = 0

    def spatial_rank(self, ndim: int) -> int:
        """Of an array with `ndim` dimensions."""
        return ndim - 2 - bool(self.block)

    def specification(self, ndim: int) -> tuple[int, ...]:
        """The positions of batch, features and spatial dimensions, as in ConvDimensionNumbers.

        The number of blocks is the first of the spatial dimensions.
        """
        if self.order == "last":
            return (0, ndim - 1, *range(1, ndim - 1))
        if self.order == "first":
            return tuple(range(ndim))
        if self.block:
            return (ndim - 1, 1, 0, *range(2, ndim - 1))
        return (ndim - 1, 0, *range(1, ndim - 1))

    def features(self, shape: tuple[int, ...]) -> int:
        """The size of the feature dimension."""
        return shape[self.specification(len(shape))[1]]

    def spatial(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of the spatial dimensions, without the blocks."""
        return tuple(shape[d] for d in self.specification(len(shape))[2 + bool(self.block) :])

    def images(self, shape: tuple[int, ...]) -> int:
        """How many images an array of this shape has room for."""
        return shape[-1] * shape[0] if self.block else shape[self.specification(len(shape))[0]]


@functools.cache
def _named() -> dict[str, tuple[Layout, int]]:
    """Layout and rank by name; rank 0 for a name that holds at any."""
    result: dict[str, tuple[Layout, int]] = {}
    for rank in (2, 1, 3):
        s = _SPATIAL[rank]
        names = {f"N{s}C": Layout("last")}
        if rank == 2:
            names["channels_last"] = Layout("last")
        names[f"NC{s}"] = Layout("first")
        if rank == 2:
            names["channels_first"] = Layout("first")
        names[f"C{s}N"] = Layout("images")
        names |= {f"C{s}N{block}": Layout("images", block) for block in _BLOCKS}
        result |= {name: (layout, 0 if rank == 2 else rank) for name, layout in names.items()}
    return result


def names() -> tuple[str, ...]:
    """One name for each layout, which holds at any rank."""
    found = {layout: name for name, (layout, own) in reversed(_named().items()) if not own}
    return tuple(found[layout] for layout, own in dict.fromkeys(_named().values()) if not own)


def parse(function: str, name: Any, ndim: int, argument: str = "layout") -> Layout:
    """The layout of that name for an array `x` with `ndim` dimensions.

    Raises:
      ValueError: there is none, or the dimensions do not fit.
    """
    if name not in _named():
        names = ", ".join(repr(n) for n in _named())
        raise ValueError(f"{function}: unknown {argument} {name!r}; choose one of {names}")
    layout, own = _named()[name]
    rank = layout.spatial_rank(ndim)
    if own and own != rank:
        family = next(n for n, (other, any_rank) in _named().items() if other == layout)
        raise ValueError(
            f"{function}: {argument} {name!r} has {own} spatial dimensions but x has {rank}; "
            f"{family!r} holds at any rank"
        )
    return layout


def check_blocks(function: str, name: str, layout: Layout, shape: tuple[int, ...]) -> None:
    """Raises ValueError where an array of this shape is not in blocks of the layout's size."""
    if layout.block and shape[-1] != layout.block:
        raise ValueError(
            f"{function}: x in layout {name!r} must have blocks of {layout.block} images as its "
            f"last dimension, got shape {shape}; convert it with jaxwin.to_layout"
        )


def to_layout(
    x: ArrayLike, layout: str, *, source: str = "NHWC", batch: int | None = None
) -> jax.Array:
    """Convert images to another layout, for `jaxwin.conv(..., layout=layout)`.

    Args:
      x: images in the layout `source`, one to three spatial dimensions.
      layout: "NHWC", "NCHW", "CHWN", or "CHWN8" or "CHWN16": blocks of 8 or 16 images, of shape
        (ceil(N / 8), C, spatial..., 8), the last block filled up with zeros. Those names hold at
        any rank; "NWC", "CDHWN8" and so on name the same at their own.
      source: the layout of `x`.
      batch: N, needed where `source` is in blocks, else None.

    Returns:
      The same values in the new layout. Linear: derivatives and `vmap` work. Any dtype.

    Raises:
      TypeError, ValueError: naming the argument at fault and its value.

    The images that fill up the last block are zeros here, but whatever `conv` makes of zeros behind
    the first bias: leave them out of sums over images, or come back with `from_layout` first. Their
    derivatives are zero if nothing depends on them.
    """
    return _convert("to_layout", x, source, "source", layout, "layout", batch)


def from_layout(
    x: ArrayLike, layout: str, *, target: str = "NHWC", batch: int | None = None
) -> jax.Array:
    """Convert images from a layout of `to_layout` to the layout `target`.

    Args:
      x: images in the layout `layout`.
      layout: the layout of `x`, a name as for `to_layout`.
      target: the layout of the result.
      batch: N, needed where `layout` is in blocks, whose last one may be filled up; else None.

    Returns:
      The same values, `batch` images of them. Linear: derivatives and `vmap` work. Any dtype.

    Raises:
      TypeError, ValueError: naming the argument at fault and its value.
    """
    return _convert("from_layout", x, layout, "layout", target, "target", batch)


def _convert(
    function: str,
    value: ArrayLike,
    source: str,
    source_argument: str,
    target: str,
    target_argument: str,
    batch: int | None,
) -> jax.Array:
    if isinstance(value, list | tuple | str) or value is None:
        raise TypeError(f"{function}: x must be an array, got {type(value).__name__}")
    x = jnp.asarray(value)
    old = parse(function, source, x.ndim, source_argument)
    rank = old.spatial_rank(x.ndim)
    if not 1 <= rank <= 3:
        raise ValueError(
            f"{function}: x must have 1 to 3 spatial dimensions, got shape {x.shape} for "
            f"{source_argument}={source!r}"
        )
    check_blocks(function, source, old, x.shape)
    new = parse(function, target, rank + 2, target_argument) if not _blocked(target) else None
    new = new or parse(function, target, rank + 3, target_argument)
    n = _batch_size(function, batch, source, old, x.shape)
    if old == new:
        return x
    if old.block and new.block:
        return into(out_of(x, old, n, Layout("images")), Layout("images"), new)
    return out_of(x, old, n, new) if old.block else into(x, old, new)


def _blocked(name: Any) -> bool:
    return name in _named() and bool(_named()[name][0].block)


def _batch_size(
    function: str, batch: int | None, name: str, layout: Layout, shape: tuple[int, ...]
) -> int:
    room = layout.images(shape)
    if batch is None:
        if layout.block:
            raise ValueError(
                f"{function}: batch is needed for layout {name!r}: how many of the {room} images "
                f"in shape {shape} are real"
            )
        return room
    try:
        n = operator.index(batch)
    except TypeError:
        raise TypeError(f"{function}: batch must be an int or None, got batch={batch!r}") from None
    if not room - max(1, layout.block) < n <= room:
        raise ValueError(
            f"{function}: batch={batch} does not fit x of shape {shape} in layout {name!r}, which "
            f"holds {room} images"
        )
    return n


def _permutation(old: Layout, new: Layout, ndim: int) -> list[int]:
    """Of an array in `old` with `ndim` dimensions, neither in blocks."""
    source, target = old.specification(ndim), new.specification(ndim)
    return [source[target.index(d)] for d in range(ndim)]


def into(x: jax.Array, old: Layout, new: Layout) -> jax.Array:
    """x from a layout without blocks to any other; the last block is filled up with zeros."""
    if not new.block:
        return lax.transpose(x, _permutation(old, new, x.ndim))
    n, feature, *spatial = old.specification(x.ndim)
    missing = -x.shape[n] % new.block
    if missing:
        x = lax.pad(
            x,
            jnp.zeros((), x.dtype),
            [(0, missing if d == n else 0, 0) for d in range(x.ndim)],
        )
    blocks = x.shape[n] // new.block
    x = lax.reshape(x, (*x.shape[:n], blocks, new.block, *x.shape[n + 1 :]))
    # Dimensions behind the batch moved by one.
    feature, *spatial = (d + (d > n) for d in (feature, *spatial))
    return lax.transpose(x, (n, feature, *spatial, n + 1))


def out_of(x: jax.Array, old: Layout, n: int, new: Layout) -> jax.Array:
    """The first n images of x from a layout in blocks to one without."""
    _, feature, _, *spatial = old.specification(x.ndim)
    batch, target_feature, *target_spatial = new.specification(x.ndim - 1)
    order: list[tuple[int, ...]] = [()] * (x.ndim - 1)
    order[batch] = (0, x.ndim - 1)
    order[target_feature] = (feature,)
    for d, source in zip(target_spatial, spatial, strict=True):
        order[d] = (source,)
    x = lax.transpose(x, [d for dims in order for d in dims])
    shape = (*x.shape[:batch], x.shape[batch] * x.shape[batch + 1], *x.shape[batch + 2 :])
    return lax.slice_in_dim(lax.reshape(x, shape), 0, n, axis=batch)

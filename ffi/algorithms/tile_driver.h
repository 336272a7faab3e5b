// SPDX-License-Identifier: Apache-2.0
//
// Convolutions with 3x3 windows by tiles: inputs, filters and results of a tile are transformed
// linearly, and between that, each of a tile's products is a matrix product over the channels on
// the dense micro-kernels. What differs between the algorithms is the transform
// (kernels/transforms.h).
//
// Numbers: each product is one chain over the channels, transforms are in a fixed order, so a
// result depends on the problem and the scheme alone. A value that is not finite spreads over the
// tile. In integers all is exact.
#pragma once

#include <utility>
#include <vector>

#include "algorithms/algorithm.h"
#include "kernels/transforms.h"

namespace jaxwin {

// Positions in Params. kTile is the scheme, by the outputs of a tile's side.
enum TileParam { kTile, kTilesPerBlock, kVectors, kOnce, kTileParams };

std::vector<ParamSpec> tile_param_specs(const std::vector<int64_t>& tiles);
std::string tile_rejects(const Problem& p);
Params tile_defaults(const Problem& p, const Target& t, const std::vector<int64_t>& tiles);
std::string tile_check(const Problem& p, const Target& t, const Params& params,
                       const std::vector<int64_t>& tiles);
int64_t tile_workspace(const Problem& p, const Target& t, const Params& params);
void tile_run(const Problem& p, const Params& params, const Operands& o, const Execution& e);
double tile_cost(const Problem& p, const Target& t, const Params& params);
double tile_error_bound(const Problem& p, const Params& params);

// The registry's row of an algorithm on this driver, a family of its own; kTiles: its schemes.
template <int64_t... kTiles>
Algorithm tile_algorithm(const char* name, const char* summary, const char* source,
                         std::vector<Dtype> dtypes) {
  static const std::vector<int64_t> tiles{kTiles...};
  Algorithm row{};
  row.name = name;
  row.summary = summary;
  row.source = source;
  row.dtypes = std::move(dtypes);
  row.params = tile_param_specs(tiles);
  row.rejects = tile_rejects;
  row.defaults = [](const Problem& p, const Target& t) { return tile_defaults(p, t, tiles); };
  row.check = [](const Problem& p, const Target& t, const Params& q) {
    return tile_check(p, t, q, tiles);
  };
  row.workspace = tile_workspace;
  row.run = tile_run;
  row.cost = tile_cost;
  row.takes_packed = true;
  row.family = name;
  row.error_bound = tile_error_bound;
  return row;
}

}  // namespace jaxwin

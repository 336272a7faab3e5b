// SPDX-License-Identifier: Apache-2.0
//
// Winograd's minimal filtering: F(2x2, 3x3) takes 16 products for 4 outputs, F(4x4, 3x3) 36 for 16,
// where a direct sum takes 9 for each.

#include "algorithms/registry.h"
#include "algorithms/tile_driver.h"

namespace jaxwin {
namespace {

const std::vector<int64_t>& tiles() {
  static const std::vector<int64_t> list{2, 4};
  return list;
}

}  // namespace

const Algorithm& algorithm_winograd() {
  static const Algorithm a = [] {
    Algorithm row{};
    row.name = "winograd";
    row.summary = "3x3 windows by F(2x2, 3x3) or F(4x4, 3x3): fewer products, larger errors";
    row.source = "arXiv 1509.09308";
    row.dtypes = {kF32, kBF16, kF16};
    row.params = tile_param_specs(tiles());
    row.rejects = tile_rejects;
    row.defaults = [](const Problem& p, const Target& t) { return tile_defaults(p, t, tiles()); };
    row.check = [](const Problem& p, const Target& t, const Params& q) {
      return tile_check(p, t, q, tiles());
    };
    row.workspace = tile_workspace;
    row.run = tile_run;
    row.cost = tile_cost;
    row.takes_packed = true;
    row.family = "winograd";
    row.error_bound = tile_error_bound;
    return row;
  }();
  return a;
}

}  // namespace jaxwin

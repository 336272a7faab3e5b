// SPDX-License-Identifier: Apache-2.0
//
// Which tuned rows may lend a problem their parameters: the search behind jaxwin/_tuning.py, which
// says what is compared and why.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "problem.h"

namespace jaxwin {

// What a problem looks like: "fwd", "dx" (dilated input) or "dw" (weight gradient). The parameters
// of lax do not say it: a transposed convolution is a "dx", a convolution with a window larger than
// its output a "dw".
const char* direction(const ConvParams& a);

// What two problems must have in common so that one may lend the other its parameters, as bytes;
// the dtypes, of which not all are known here, and whatever is no matter of the problem come on
// top.
std::string kind(const ConvParams& a);

// The sizes in which they may differ: input channels and output features per group, groups, pixels
// of an image, batch.
std::vector<int64_t> sizes(const ConvParams& a);

// Things of some kinds that have sizes, numbered as they are added. The distance of two is the sum
// of |log2 ratio| of their sizes, each times its weight. The first `leading` sizes come first: of
// the things that are the nearest in these, those count that are the nearest in the others.
class Neighbours {
 public:
  Neighbours(const std::vector<double>& weights, size_t leading, double limit);

  // Both throw where the number of sizes is not that of the weights.
  void add(const std::string& kind, const std::vector<int64_t>& sizes);
  // The numbers of a few things of the kind within the limit, the nearest first.
  std::vector<int64_t> nearest(const std::string& kind, const std::vector<int64_t>& sizes) const;

 private:
  using Sizes = std::vector<int64_t>;
  using Point = std::vector<double>;  // weighted logarithms of sizes

  struct Near {
    double distance;
    size_t line;
    bool smaller;  // than what is asked for, in the first size
    size_t place;
    bool operator<(const Near& other) const;
  };
  // Different sizes, in the order in which they came.
  struct Places {
    std::vector<double> points;                    // one behind the other
    std::vector<size_t> line;                      // those of a line differ in the first size alone
    std::vector<std::pair<double, size_t>> order;  // by the first coordinate: it and the place
    std::map<Sizes, size_t> known, lines;

    size_t at(const Sizes& sizes, const Point& point);
    std::vector<Near> nearest(const Point& point, double limit) const;
  };
  struct Kind {
    Places firsts;
    std::vector<Places> rests;                              // for each of firsts
    std::vector<std::vector<std::vector<int64_t>>> things;  // for each of these
  };
  struct Halves {
    Sizes first, rest;
    Point first_point, rest_point;
  };
  Halves halves(const Sizes& sizes) const;

  std::vector<double> weights_;
  size_t leading_;
  double limit_;
  std::unordered_map<std::string, Kind> kinds_;
  int64_t count_ = 0;
};

}  // namespace jaxwin
